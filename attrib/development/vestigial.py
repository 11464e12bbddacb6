"""What a group built up and tore down again: gross against net, and the running sum between.

gross_g    = sum over steps of |timeline_s,g|
net_g      = sum over steps of timeline_s,g                what is left at the end
height_g   = max over s of the sum up to s, and 0           how much it raised the measurement at most
left_g     = net_g / height_g                              small, or below 0: vestigial
"""

import numpy as np
import xarray as xr

from ..result import Result

LEFT = 0.25  # of its height
HEIGHT = 0.1  # of the largest height


def vestiges(result: Result, query: int = 0, left: float = LEFT, height: float = HEIGHT) -> xr.Dataset:
    """Groups that a measurement once rested on and does not any more, by the account of the run.

    Accounting, not causation: confirm with `attrib.ablate` and `attrib.what_if`. A measurement that saturates, such as a
    log-probability near 0, forgets what is taken away while another group stands in; logits and margins do not.

    Args:
        result: from `attrib.attribute`, of a measurement that is better when it is higher: for a loss, its negative.
        query: which one, by its position.
        left, height: a group is vestigial where at most this share of its height is left, and its height is at least this
            share of the largest.

    Returns:
        Over group: `gross`, `net`, `height` in the measurement's units, `left` (1 at most, NaN where there was no height),
        `step` at which the height was reached, `vestigial` (bool); and `running` (update_step, group).

    Raises:
        IndexError: no such query.

    Example:
        >>> found = attrib.vestiges(result)
        >>> found["vestigial"].dtype, found["running"].shape
        (dtype('bool'), (12, 4))
    """
    count = result.dataset.sizes["query"]
    if not -count <= query < count:
        raise IndexError(f"no such query: got {query}, expected 0 to {count - 1}. Choose one by its position.")
    changes = result.timeline().isel(query=query, drop=True).transpose("update_step", "group")
    running = changes.cumsum("update_step").assign_coords(update_step=changes["update_step"].values)
    top = np.maximum(running.values.max(0), 0.0)
    net = running.isel(update_step=-1, drop=True)
    share = np.divide(net.values, top, out=np.full_like(top, np.nan), where=top > 0)
    steps = changes["update_step"].values[running.values.argmax(0)]
    found = (share <= left) & (top >= height * top.max())
    columns = {"height": top, "left": share, "step": steps, "vestigial": found}
    return xr.Dataset(
        {"gross": abs(changes).sum("update_step"), "net": net,
         **{name: ("group", values) for name, values in columns.items()}, "running": running},
        attrs={"units": result.units},
    ).drop_vars("query_name", errors="ignore")  # fmt: skip
