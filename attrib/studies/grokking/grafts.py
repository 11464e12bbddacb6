"""What becomes of a run when its layers are exchanged between steps: swaps, transplants, re-insertions, their controls."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...intervention import Intervention, Permute, Redraw, Transplant, retrain
from ...layout import match_names
from ...run import Run
from ..modular import GENERALISED, Pairs, accuracy
from ..parts import SeedParts
from ..recipe import cross_entropy
from .setting import Setting

INITS: dict[str, Callable[[Tensor], Any] | None] = {
    "own": None,
    "0.1 normal": lambda t: torch.nn.init.normal_(t, std=0.1),
}


MAIN = ("inner kept", "outer kept")  # conditions with a trial for every draw
EARLY = 0.25  # of the steps to generalise: a state from before grokking


class Grafts:
    """Trials on one recorded run: each is made once, and kept in the study's folder.

    generalised: the step at which the untouched run does.
    """

    def __init__(self, setting: Setting, run: Run, pairs: Pairs, parts: SeedParts, generalised: int) -> None:
        self.setting, self.run, self.pairs, self.parts = setting, run, pairs, parts
        self.seed, self.generalised = parts.seed, generalised
        self.model = setting.build(setting.p)
        self._sides = {"inner": setting.inner, "outer": setting.outer}

    # without training

    def swaps(self, states: Sequence[int]) -> list[dict[str, float]]:
        """Inner layers of each state with the outer ones of the last, and the other way round: accuracy on the held-out
        pairs, and KL(last || swapped) in nats."""
        last = self.run.parameters(self.run.steps)
        expected = F.log_softmax(self._outputs(last), -1)
        rows = []
        for state in states:
            here, row = self.run.parameters(state), {"step": float(state)}
            for side, groups in self._sides.items():
                taken = self._names(groups)
                mixed = {name: here[name] if name in taken else value for name, value in last.items()}
                outputs = self._outputs(mixed)
                row[f"{side} accuracy"] = _accuracy(outputs, self.pairs)
                row[f"{side} kl"] = float(F.kl_div(F.log_softmax(outputs, -1), expected, None, None, "batchmean", True))
            rows.append(row)
        return rows

    def _names(self, groups: Sequence[str]) -> set[str]:
        patterns = self.setting.patterns(tuple(groups))
        return set(match_names(self.run.layout.names, patterns, self.setting.name))

    def _outputs(self, parameters: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.func.functional_call(self.model, parameters, (self.pairs.x[self.pairs.test],))

    # with training

    def transplants(self) -> dict[str, list[Any]]:
        """Some layers of the last state, the rest drawn anew, trained from the start: condition -> a trial per draw."""
        found: dict[str, list[Any]] = {}
        for init in self.setting.inits:
            for name, grafted in self._conditions().items():
                trials = found.setdefault(f"{name} [{init}]", [])
                for draw in range(self.setting.draws if name in MAIN else 1):
                    fresh = Redraw("*", INITS[init], 1000 + 100 * self.seed + draw)
                    key = f"transplant {name} {init} {draw}{self._sources(grafted)}"
                    trials.append(self._trial(key, 0, self.setting.retrain, [fresh, *grafted]))
        return found

    def _conditions(self) -> dict[str, list[Intervention]]:
        """What is put in, for the two directions and the controls."""
        last = self.run.steps
        found: dict[str, list[Intervention]] = {
            f"{side} kept": [self._graft(groups, last, "reset")] for side, groups in self._sides.items()
        }
        for side, groups in self._sides.items():
            for name, changes in self._controls(side, groups, last, "reset").items():
                found[f"{side}: {name}"] = changes
        return {**found, "embedding alone": [self._graft(("embedding",), last, "reset")], "nothing kept": []}

    def _controls(
        self, side: str, groups: Sequence[str], step: int, state: str, earliest: int = 0
    ) -> dict[str, list[Intervention]]:
        """The same layers from before grokking, those of `step` with their neurons in another order, and as many
        entries drawn from all layers."""
        whole = self._graft(groups, step, state)
        axes = self.setting.before if side == "inner" else self.setting.after
        sizes = {name: value.numel() for name, value in self.run.parameters(0).items()}
        share = sum(sizes[name] for name in self._names(groups)) / sum(sizes.values())
        found: dict[str, list[Intervention]] = {
            "permuted neurons": [whole, Permute(axes, self.seed)],
            "equal size": [Transplant("*", self.run, step, state, share, self.seed)],
        }
        before = round(EARLY * self.generalised)
        if before > earliest:
            found["from before grokking"] = [self._graft(groups, before, state)]
        return found

    def reinsertions(self) -> dict[str, dict[str, Any]]:
        """Layers of later states put into earlier ones of the same run, which then goes on: set -> "source target" ->
        trial. Steps as shares of the step at which the run generalises."""
        found: dict[str, dict[str, Any]] = {}
        for name, groups in self.setting.sets.items():
            cells = found.setdefault(name, {})
            for source in self.setting.sources:
                for target in self.setting.targets:
                    start, step = round(target * self.generalised), round(source * self.generalised)
                    if start < step:
                        graft = self._graft(groups, step, "taken")
                        cells[f"{source:g} {target:g}"] = self._reinsert(f"{name} {step} {start}", start, [graft])
        return found

    def controls(self) -> dict[str, dict[str, Any]]:
        """Beside the re-insertion from the step of generalisation: condition -> target -> trial."""
        found: dict[str, dict[str, Any]] = {}
        for target in self.setting.compared:
            start = round(target * self.generalised)
            conditions: dict[str, list[Intervention]] = {
                "embedding alone": [self._graft(("embedding",), self.generalised, "taken")]
            }
            for side, groups in self._sides.items():
                for state in ("kept", "reset"):
                    conditions[f"{side}, optimizer state {state}"] = [self._graft(groups, self.generalised, state)]
                for name, changes in self._controls(side, groups, self.generalised, "taken", start).items():
                    conditions[f"{side}: {name}"] = changes
            for name, changes in conditions.items():
                found.setdefault(name, {})[f"{target:g}"] = self._reinsert(
                    f"control {name} {start}{self._sources(changes)}", start, changes
                )
        return found

    def _sources(self, changes: Sequence[Intervention]) -> str:
        """Steps that something is taken from, where they are not the usual ones: part of a trial's name."""
        usual = (self.generalised, self.run.steps)
        return "".join(f" from {c.step}" for c in changes if isinstance(c, Transplant) and c.step not in usual)

    def _reinsert(self, key: str, start: int, changes: list[Intervention]) -> Any:
        longest = max(1, round(self.setting.longest * (self.generalised - start)))
        return self._trial(f"reinsert {key}", start, min(longest, self.setting.at_most), changes)

    def _graft(self, groups: Sequence[str], step: int, state: str) -> Transplant:
        return Transplant(self.setting.patterns(tuple(groups)), self.run, step, state)

    def _trial(self, key: str, start: int, given: int, changes: list[Intervention]) -> Any:
        """{"memorised", "generalised": steps it took, None where not reached; "curve": step, train, held-out accuracy}."""

        def train() -> dict[str, Any]:
            curve: list[list[float]] = []
            states = retrain(self.run, start, changes, model=self.model, loss=cross_entropy, until=start + given)
            for state, model in states:
                if (state - start) % self.setting.every == 0:
                    curve.append([state - start, *_accuracies(model, self.pairs)])
                    if curve[-1][2] >= GENERALISED:
                        break
            reached = {
                name: next((row[0] for row in curve if row[column] >= GENERALISED), None)
                for name, column in (("memorised", 1), ("generalised", 2))
            }
            return {**reached, "given": given, "curve": curve}

        return self.parts.trial(key, train)


def _accuracies(model: nn.Module, pairs: Pairs) -> list[float]:
    return [round(accuracy(model, pairs, ids), 4) for ids in (pairs.train, pairs.test)]


def _accuracy(outputs: Tensor, pairs: Pairs) -> float:
    return float((outputs.argmax(-1) == pairs.y[pairs.test]).double().mean())
