"""Tables for the terminal."""

from collections.abc import Callable

import numpy as np

from ..result import Result
from ..run import Run

BAR = 24


def ledger(result: Result, rtol: float) -> str:
    """The checked ledger of a result, with its identities."""
    return str(result.check(rtol))


def largest(result: Result, query: int, n: int, describe: Callable[[int], str]) -> str:
    """The n contributions of examples that are largest in size, signed, with a bar."""
    contributions = result.by("example").isel(query=query)
    order = np.argsort(-np.abs(contributions.values), kind="stable")[:n]
    widest = float(np.abs(contributions.values[order]).max(initial=1e-300))
    lines = []
    for k in order:
        value = float(contributions.values[k])
        length = max(1, round(BAR * abs(value) / widest))
        mark = ("+" if value > 0 else "-") * length
        lines.append(f"{describe(int(contributions['example'].values[k])):>16s} {value:+11.4f}  {mark}")
    return "\n".join(lines)


def timeline(result: Result, query: int, windows: int = 12) -> str:
    """The measurement and what each group's updates changed, window by window of steps."""
    changes = result.timeline().isel(query=query)
    curve = result.curve.isel(query=query)
    groups = [str(g) for g in changes["group"].values]
    width = max(10, *(len(g) + 2 for g in groups))
    steps = changes["update_step"].values
    lines = ["steps".ljust(14) + "measurement".rjust(13) + "".join(g.rjust(width) for g in groups)]
    for part in np.array_split(np.arange(len(steps)), min(windows, len(steps))):
        sums = changes.values[part].sum(0)
        label = f"{steps[part[0]]} - {steps[part[-1]]}"
        lines.append(
            label.ljust(14) + f"{curve.values[part[-1] + 1]:13.4f}" + "".join(f"{v:+{width}.4f}" for v in sums)
        )
    total = changes.values.sum(0)
    lines.append("sum".ljust(27) + "".join(f"{v:+{width}.4f}" for v in total))
    return "\n".join(lines)


def describe_run(run: Run) -> str:
    """The facts about a stored run."""
    h, size = run.header, run.reader.nbytes_stored() / 2**20
    checked = run.log("batch_identity")
    rows = {
        "store": run.reader.target,
        "steps": f"{run.steps}"
        if run.complete
        else f"{run.steps} (not closed, or interrupted: read up to its last committed block)",
        "examples": len(run.examples),
        "parameters": f"{run.layout.size} in {len(run.groups)} tensors",
        "model": h["model"],
        "optimizer": h["optimizer"],
        "type": h["dtype"],
        "capture": h["capture"],
        "size": f"{size:.1f} MiB, {h['block']} steps a block",
        "batch identity": f"{_worst(checked)} over {int((~np.isnan(checked)).sum())} checked steps "
        f"(the first, then every {h['check_every']})",
        "step identity": f"{_worst(run.log('step_identity'))} over all steps",
        "written with": ", ".join(f"{name} {v}" for name, v in h["versions"].items()),
        "recorded": h["recorded"],
    }
    return "\n".join(f"{name:16s}{value}" for name, value in rows.items())


def _worst(gaps: np.ndarray) -> str:
    return f"largest gap {np.nanmax(gaps):.2e}" if (~np.isnan(gaps)).any() else "not checked"
