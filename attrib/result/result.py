"""What attribution gives: a labelled dataset in which every term has its name, and the ledger that they add up in.

Dimensions: query, step (whose batch supplied the gradient), example (recorded ids, numbers or strings), group; update_step
(which moved the parameters) stands only in `timeline`. Positive contributions raised the measurement. Units: the
measurement's.
"""

from html import escape

import numpy as np
import xarray as xr

from ..errors import (
    AttribError,
    BatchIdentityError,
    CompletenessError,
    LimitIdentityError,
    LossError,
    SplitIdentityError,
)
from ..ledger import Ledger, terms_of
from ..parts import check_parts, rounding_allowed, size_of
from .labelled import Labelled

SUMMED = ("batch", "step", "measurement")  # the identities that completeness is made of
IDENTITIES = (*SUMMED, "split", "limit")


_ROUNDING = (
    " A bias before batch normalisation has a gradient of rounding alone, which Adam divides by its own size: build its "
    'layer with bias=False, or record with remainder="account".'
)


class Result(Labelled):
    """The decomposition of one or more measurements. Made by `attrib.attribute` or `attrib.open_result`.

    dataset: xarray.Dataset with initial, final, residual, rounding, spacing, gross, sizes (query);
        decay (query, step, group); inherited (query, group); where there is one, remainder (query, step, group) and
        update_remainder and buffers (query, update_step, group);
        timeline (query, update_step, group); curve (query, state); one array per kept marginal; the identities by step.

    Example:
        >>> result.by("step", "example").shape
        (2, 12, 24)
        >>> result.top(1).columns.tolist()
        ['query', 'example', 'contribution']
        >>> terms = result.by() + result.decay.sum(["step", "group"]) + result.inherited.sum("group")
        >>> bool(abs(result.initial + terms - result.final).max() < 1e-12)
        True
    """

    question = "accounting"

    @property
    def initial(self) -> xr.DataArray:
        """(query,): the measurement before the first step."""
        return self.dataset["initial"]

    @property
    def final(self) -> xr.DataArray:
        """(query,): the measurement after the last step."""
        return self.dataset["final"]

    @property
    def residual(self) -> xr.DataArray:
        """(query,): final minus initial minus all terms; measured, never spread over them."""
        return self.dataset["residual"]

    @property
    def decay(self) -> xr.DataArray:
        """(query, step, group): weight decay and a penalty in the loss, no example's; zeros where there was none."""
        return self.dataset["decay"]

    @property
    def inherited(self) -> xr.DataArray:
        """(query, group): momentum that was there before the first step; zeros where there was none."""
        return self.dataset["inherited"]

    @property
    def remainder(self) -> xr.DataArray:
        """(query, step, group): what the gradients held beyond the examples' shares (noise, clipping by value, hooks, what a
        pass in few bits rounds, gradients that are rounding alone); zeros where there is none."""
        return self._row("remainder", self.decay)

    @property
    def update_remainder(self) -> xr.DataArray:
        """(query, update_step, group): what updates held beyond what their rule makes of the gradients; zeros where a rule
        makes all of it."""
        return self._row("update_remainder", self.timeline())

    @property
    def buffers(self) -> xr.DataArray:
        """(query, update_step, group): what changes of buffers did that training made (running statistics), each at the
        group of its module's parameters; zeros where it made none."""
        return self._row("buffers", self.timeline())

    def _row(self, name: str, like: xr.DataArray) -> xr.DataArray:
        return self.dataset[name] if name in self.dataset else xr.zeros_like(like).rename(name)

    @property
    def curve(self) -> xr.DataArray:
        """(query, state): the measurement at every state of the window."""
        return self.dataset["curve"]

    @property
    def trace(self) -> xr.DataArray:
        """(query, state): the measurement."""
        return self.curve.rename("measurement")

    def timeline(self) -> xr.DataArray:
        """(query, update_step, group): the change that each step's update made, decay, momentum and buffers included.

        The other clock: it sums to final - initial as `by` does with its terms, but stands on the step that moved the
        parameters, not on the one whose batch supplied the gradient.
        """
        return self.dataset["timeline"]

    def ledger(self) -> Ledger:
        """The terms summed, per query, whether or not they add up: see `check`."""
        rows = {name: self.dataset[name] for name in terms_of(self.dataset)}
        terms = xr.Dataset(
            {
                "initial": self.initial,
                "examples": self.by(),
                **{name: row.sum([d for d in row.dims if d != "query"]) for name, row in rows.items()},
                "residual": self.residual,
                "final": self.final,
            }
        )
        sizes = {name: self._size(row) for name, row in rows.items() if name.endswith("remainder")}
        share = [str(self.dataset.attrs.get(name, "")) for name in ("shares", "share")]
        return Ledger(terms, {name: self.gap(name) for name in IDENTITIES}, sizes, *share)

    def _size(self, row: xr.DataArray) -> str:
        """How large a row is that may hold anything: through U, and as it was recorded."""
        gross = self.dataset["gross"].values
        share = abs(row).sum([d for d in row.dims if d != "query"]).values / np.where(gross > 0, gross, 1.0)
        shown = f"{share.max():.2e} of the gross"
        largest, count = self.dataset.attrs.get(str(row.name), (0.0, 0))
        return f"{shown}; at most {largest:.2e} of |p.grad| at {count} checked steps" if count else shown

    def check(self, rtol: float = 1e-6) -> Ledger:
        """Check that initial + examples + decay + inherited == final, with a remainder where there is one, as far as numbers
        can be stored, and that all arrays of the result say the same.

        Args:
            rtol: bound on |residual|, relative to the gross size of what is summed: the largest of |initial|, |final| and
                the sum over steps and tensors of |contributions|, |decay|, |remainder| and |buffers|. On top of it is
                allowed what rounding makes of the residual: the part that was measured to come from rounding the stored
                parameters (`dataset["rounding"]`), as far as their spacing explains it, in float64 nothing; and eps of the
                run's type times the sizes of the single contributions (`dataset["sizes"]`), from which they cancel, at most
                its root times what is summed.

        Raises:
            CompletenessError: with the worst query, its residual and the identity that is furthest off; also where a number
                is not finite, or two arrays do not add up to the same.
            StoreError: a file of a result that was opened is missing or damaged.
            SplitIdentityError: a share is not that of its example, though all add up; names step, example and group.
            LimitIdentityError: the path's vector is not a gradient in the limit; names query and parameter.
            LossError, BatchIdentityError: the run accounts for a remainder, and the losses are not those that were recorded,
                or the remainder is more than the rounding that it is accounted for.
        """
        ledger = self.ledger()
        failing: list[tuple[str, type[AttribError]]] = [("split", SplitIdentityError), ("limit", LimitIdentityError)]
        if "remainder" in self.dataset:  # else the terms would not add up
            failing += [("loss", LossError), ("batch", BatchIdentityError)]
        for name, error in failing:
            if (failure := self.dataset.attrs.get(f"{name}_failure")) is not None:
                raise error(f"{failure}\n{ledger}")
        residual = np.abs(ledger.terms["residual"].values)
        gross = size_of(self.dataset)
        gap = np.maximum(residual - rounding_allowed(self.dataset), 0.0) / np.where(gross > 0, gross, 1.0)
        gap = np.where(np.isfinite(residual), gap, np.inf)
        worst = int(np.argmax(gap))
        if not gap[worst] <= rtol:
            summed = {n: gap for n, gap in ledger.identities.items() if n in SUMMED and not np.isnan(gap)}
            name = max(summed, key=summed.__getitem__)
            at = self.dataset[f"{name}_identity"]
            step = int(at["step"].values[int(np.nanargmax(at.values))])
            hint = " Are model and loss those that were recorded?" if name == "batch" else ""
            hint = _ROUNDING if "buffers" in self.dataset and "remainder" not in self.dataset else hint
            raise CompletenessError(
                f"the terms do not add up: got a residual of {gap[worst]:.3g} of what is summed, expected at most "
                f"{rtol:.3g}, at query {self.dataset['query'].values[worst]}. The {name} identity is furthest off, by "
                f"{ledger.identities[name]:.3g} at step {step}.{hint}\n{ledger}"
            )
        check_parts(self.dataset, rtol)
        return ledger

    def __repr__(self) -> str:
        return f"{self._head()}\n{self.ledger()}"

    def _head(self) -> str:
        sizes = self.dataset.sizes
        kept = "; ".join(", ".join(k) for k in self.kept)
        return (
            f"<attrib.Result: {sizes['query']} queries over {sizes['step']} steps, {sizes['example']} examples, "
            f"{sizes['group']} groups; kept: {kept}>"
        )

    def _repr_html_(self) -> str:
        """For notebooks: the ledger, and the largest contributions to the first query where examples were kept."""
        shown = f"<p>{escape(self._head())}</p>{self.ledger()._repr_html_()}"
        if self.has("example"):
            first = self.select([0])
            table = first.top(3).drop(columns="query").to_html(index=False, border=0, float_format="{:+.4f}".format)
            units = f" ({escape(self.units)})" if self.units else ""
            shown += f"<p>Largest and smallest contributions to query {escape(first.names[0])}{units}</p>{table}"
        return shown
