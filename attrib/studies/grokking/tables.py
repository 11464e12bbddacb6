"""The seeds beside each other, as labelled arrays: what figures and claims are made of.

Speed-up: steps that the untouched run still needed to generalise, over the steps that the changed one took. Missing (NaN)
where the changed one did not generalise in the steps it was given; it is then below its `bound`, the same over the steps
given. The bound is missing where there was no trial.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .. import frame
from .account import HELD_OUT, TRAINED
from .setting import Setting

Run = Mapping[str, Any]  # what `study_seed` gives
GRID = np.linspace(0, 1, 51)  # of the step at which a run generalises
BINS = 30


class Tables:
    """Of all seeds that generalised; `failed` are those that did not."""

    def __init__(self, setting: Setting, found: Sequence[Run]) -> None:
        self.setting, self.everyone = setting, found
        self.runs = [run for run in found if run["training"]["generalised"] is not None]
        self.failed = [run["seed"] for run in found if run["training"]["generalised"] is None]
        self.seeds = [run["seed"] for run in self.runs]

    def steps(self, name: str) -> np.ndarray:
        """(seed,): "memorised", "generalised", "memorisation onset", "generalisation onset"."""
        return np.array([run["training"][name] for run in self.runs], dtype=float)

    # looks

    def looks(self, columns: Mapping[str, int], name: str) -> xr.DataArray:
        """(pairs, seed, step) of the untouched runs; `columns` of a look by what they are called."""
        curves = [np.array(run["training"]["curve"], dtype=float) for run in self.everyone]
        steps = np.unique(np.concatenate([c[:, 0] for c in curves])).astype(int)
        values = np.full((len(columns), len(curves), len(steps)), np.nan)
        for s, curve in enumerate(curves):
            at = np.searchsorted(steps, curve[:, 0].astype(int))
            for k, column in enumerate(columns.values()):
                values[k, s, at] = curve[:, column]
        seeds = [run["seed"] for run in self.everyone]
        return xr.DataArray(values, {"pairs": list(columns), "seed": seeds, "step": steps}, name=name)

    def along(self, name: str, runs: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray]]], units: str) -> xr.DataArray:
        """(name, seed, progress): curves of each seed, against its steps over the step at which it generalised."""
        labels = list(runs[0][1])
        values = np.full((len(labels), len(runs), len(GRID)), np.nan)
        for s, ((steps, curves), whole) in enumerate(zip(runs, self.steps("generalised"), strict=True)):
            for k, label in enumerate(labels):
                values[k, s] = np.interp(GRID, steps / whole, curves[label])
        return xr.DataArray(values, {name: labels, "seed": self.seeds, "share of the steps": GRID}, name=units)

    @cached_property
    def progress(self) -> xr.DataArray:
        """(loss, seed, share of the steps): restricted and excluded loss, in nats."""
        rows = [run["progress"]["rows"] for run in self.runs]
        names = {"restricted, held-out pairs": "restricted", "excluded, training pairs": "excluded"}
        curves = [
            (np.array([r["step"] for r in seed]), {n: np.array([r[k] for r in seed]) for n, k in names.items()})
            for seed in rows
        ]
        return self.along("loss", curves, "loss (nats)")

    def swaps(self, measure: str, name: str) -> xr.DataArray:
        """(layers, seed, share of the steps): "accuracy" or "kl" of the mixed network."""
        sides = {"inner of the step, outer of the last": "inner", "outer of the step, inner of the last": "outer"}
        curves = [
            (
                np.array([row["step"] for row in run["swaps"]]),
                {label: np.array([row[f"{side} {measure}"] for row in run["swaps"]]) for label, side in sides.items()},
            )
            for run in self.runs
        ]
        return self.along("layers", curves, name)

    def frequencies(self, run: Run) -> xr.DataArray:
        """(frequency,): F_k of the last state."""
        shares = run["progress"]["rows"][-1]["frequencies"]
        return xr.DataArray(shares, {"frequency": np.arange(1, len(shares) + 1)}, name="share of the neurons' variance")

    def residues(self, run: Run) -> xr.DataArray:
        """(residue,): mean contribution of a training pair by its sum's distance from the query's, in nats."""
        profile = run["residues"]["profile"]
        return xr.DataArray(profile, {"distance of the sums": np.arange(len(profile))}, name="mean contribution (nats)")

    # layers over time

    def borders(self, run: Run) -> dict[str, tuple[int, int]]:
        """Phases by what was seen: name -> steps."""
        t, last = run["training"], run["steps"]
        found = {
            "memorising": (0, t["memorised"]),
            "plateau": (t["memorised"], t["generalisation onset"]),
            "generalising": (t["generalisation onset"], t["generalised"]),
            "after": (t["generalised"], last),
        }
        return {name: (max(0, a), min(b, last)) for name, (a, b) in found.items() if b > a}

    def terms(self, run: Run, query: int) -> xr.DataArray:
        """(term, step, group): contribution of the training pairs, decay, and their balance, in nats."""
        result = run["result"]
        contribution = result.by("step", "group").isel(query=query).transpose("step", "group")
        decay = result.decay.isel(query=query).transpose("step", "group")
        terms = xr.concat([contribution, decay, contribution + decay], "term")
        return terms.assign_coords(term=["contribution", "decay", "balance"]).rename("nats")

    @cached_property
    def by_phase(self) -> xr.DataArray:
        """(phase, term, group, seed): sums over phases for the held-out pairs, in nats."""
        rows = []
        for run in self.runs:
            terms, borders = self.terms(run, HELD_OUT), self.borders(run)
            phases = [
                terms.sel(step=slice(a, b - 1)).sum("step") if (a, b) != (0, 0) else terms.isel(step=0) * np.nan
                for a, b in (borders.get(name, (0, 0)) for name in ("memorising", "plateau", "generalising", "after"))
            ]
            rows.append(xr.concat(phases, "phase"))
        found = xr.concat(rows, "seed").assign_coords(
            seed=self.seeds, phase=["memorising", "plateau", "generalising", "after"]
        )
        return found.transpose("phase", "term", "group", "seed").rename("nats")

    def prominence(self, run: Run, phase: str) -> float:
        """Sizes of decay over sizes of the examples' contributions to the held-out pairs, over steps and layers."""
        first, last = self.borders(run).get(phase, (0, 1))
        sizes = abs(self.terms(run, HELD_OUT).sel(step=slice(first, last - 1))).sum(("step", "group"))
        return float(sizes.sel(term="decay") / sizes.sel(term="contribution"))

    def memorising(self, run: Run) -> xr.DataArray:
        """(group,): what the updates of each layer did to the training pairs while they were memorised, in nats."""
        changes = run["result"].timeline().isel(query=TRAINED)
        return changes.sel(update_step=slice(0, run["training"]["memorised"] - 1)).sum("update_step")

    def flips(self, run: Run) -> xr.DataArray:
        """(group,): how often, from bin to bin between memorising and generalising, the sign of its change flips; 0 to 1."""
        first, last = run["training"]["memorised"], run["training"]["generalised"]
        changes = run["result"].timeline().isel(query=HELD_OUT).sel(update_step=slice(first, last - 1))
        values = changes.transpose("update_step", "group").values
        edges = np.unique(np.linspace(0, len(values), BINS + 1).astype(int))[:-1]
        signs = np.sign(np.add.reduceat(values, edges, axis=0))
        return xr.DataArray((signs[1:] != signs[:-1]).mean(0), {"group": changes["group"].values})

    # trials

    @cached_property
    def transplants(self) -> xr.DataArray:
        """(condition, trial): steps to generalise of layers of the grokked run among others drawn anew."""
        names = list(self.runs[0]["transplants"])
        trials = {name: [t for run in self.runs for t in run["transplants"].get(name, [])] for name in names}
        width = max(map(len, trials.values()))
        values = np.full((len(names), width), np.nan)
        for row, found in zip(values, trials.values(), strict=True):
            row[: len(found)] = [_number(t["generalised"]) for t in found]
        return xr.DataArray(values, {"kept": names, "trial": np.arange(width)}, name="steps to generalise")

    def trials(self, name: str) -> list[tuple[Run, Mapping[str, Any]]]:
        """All transplants of a condition, each with its run."""
        return [(run, trial) for run in self.runs for trial in run["transplants"].get(name, [])]

    @cached_property
    def reinsertions(self) -> xr.Dataset:
        """speed_up and bound (layers, source, target, seed)."""
        s = self.setting
        labels: dict[str, list[Any]] = {
            "layers": list(s.sets),
            "taken from": list(s.sources),
            "put into": list(s.targets),
            "seed": self.seeds,
        }
        return self._speeds(
            labels, lambda run, name, source, target: run["reinsertions"][name].get(f"{source:g} {target:g}")
        )

    @cached_property
    def controls(self) -> xr.Dataset:
        """speed_up and bound (condition, target, seed); the layers of the step of generalisation themselves among them."""
        s = self.setting
        names = list(dict.fromkeys(name for run in self.runs for name in run["controls"]))
        labels = {"condition": names, "put into": list(s.compared), "seed": self.seeds}
        found = self._speeds(labels, lambda run, name, target: run["controls"].get(name, {}).get(f"{target:g}"))
        sides = {side: next(n for n, g in s.sets.items() if g == getattr(s, side)) for side in ("inner", "outer")}
        whole = self.reinsertions.sel({"taken from": 1.0, "put into": list(s.compared)}).drop_vars("taken from")
        rows = [
            whole.sel(layers=name).drop_vars("layers").expand_dims(condition=[side]) for side, name in sides.items()
        ]
        return xr.concat([*rows, found], "condition")

    def _speeds(self, labels: Mapping[str, list[Any]], trial_of: Callable[..., Mapping[str, Any] | None]) -> xr.Dataset:
        """Of each run's trial for a name and steps, the last of which it starts from."""
        *axes, _ = labels.values()
        values = np.full((2, *map(len, labels.values())), np.nan)
        for at in np.ndindex(*map(len, axes)):
            key = [axis[k] for axis, k in zip(axes, at, strict=True)]
            for r, run in enumerate(self.runs):
                if trial := trial_of(run, *key):
                    values[(slice(None), *at, r)] = self.speed_up(run, key[-1], trial)
        names = ("speed_up", "bound")
        return xr.Dataset({name: (list(labels), v) for name, v in zip(names, values, strict=True)}, dict(labels))

    def speed_up(self, run: Run, target: float, trial: Mapping[str, Any]) -> tuple[float, float]:
        """And its bound."""
        whole = run["training"]["generalised"]
        left, took = whole - round(target * whole), trial["generalised"]
        given = left / trial["given"]
        return (float("nan"), given) if took is None else (left / max(took, self.setting.every), given)

    def pruning(self, measure: str, name: str) -> xr.DataArray:
        """(score, weights kept, seed): "accuracy", "agreement" with the whole network, or "kl" from it."""
        rows = [run["pruning"] for run in self.runs]
        scores = list(dict.fromkeys(row["score"] for row in rows[0]))
        kept = list(dict.fromkeys(row["kept"] for row in rows[0]))
        values = np.array([[row[measure] for row in seed] for seed in rows]).T.reshape(len(scores), len(kept), -1)
        return xr.DataArray(values, {"score": scores, "weights kept": kept, "seed": self.seeds}, name=name)


class Page(frame.Page):
    """The tables, and the article that is written of them."""

    def __init__(self, tables: Tables, folder: Path, lead: str) -> None:
        super().__init__(f"Grokking: {tables.setting.name}", lead, folder)
        self.t, self.setting = tables, tables.setting


def median(data: xr.DataArray, over: str = "seed") -> xr.DataArray:
    """Missing counts as slower than all others; missing itself where half or more are."""
    found = data.fillna(-np.inf).median(over)
    return found.where(np.isfinite(found)).rename(data.name)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
