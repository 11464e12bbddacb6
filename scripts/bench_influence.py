"""How well scores per example foretell what leaving examples out does: the linear datamodelling score of many methods.

    python scripts/bench_influence.py --settings "mlp sgd gelu" "mlp adamw gelu" --folder influence-out
    python scripts/bench_influence.py --quick
    python scripts/influence_table.py influence-out --page docs/influence_table.md

Per setting and seed a network is trained and recorded, trained again without 1, 5, 20 and 50 % of its examples, 50 times
each, and scored by every method. All of it goes to files; what is done stays done: started again it goes on, and
`influence_table.py` makes tables of what is there.

Other packages run in an environment of their own (scripts/peers/requirements.txt says how it is made). With
`--peers "PYTHON"`, the command of its Python, this script calls `scripts/peers/score.py` with it; or call that by hand on
FOLDER/*/seed*. The data, states and network of each setting are written there.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from influence_settings import QUERIES, SETTINGS, Data, Setting
from influence_table import printed
from models import loss
from settings import machine
from torch import Tensor, nn

import attrib
from attrib.studies.recipe import train_recorded

CHECKPOINTS = 5
LIGHTER = 0.2  # in the run that a difference is taken to, every example weighs so much less


@dataclass(frozen=True)
class Case:
    """A setting trained with a seed. folder: of its run, its outcomes and scores."""

    setting: Setting
    run: attrib.Run
    model: nn.Module
    data: Data
    folder: Path

    @property
    def measurement(self) -> Any:
        return attrib.measure.Measurement(_log_prob, self.data[2:], "log-probability", "nats")

    def gradients(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        """(B, P): of the loss of each example, at a state of the run."""
        parameters = {name: t.double() for name, t in self.run.parameters(step).items()}

        def one(named: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss(lambda z: torch.func.functional_call(self.model, named, (z,)), x[None], y[None])[0]

        found = torch.func.vmap(torch.func.grad(one), (None, 0, 0), chunk_size=64)(parameters, x, y)
        return torch.cat([g.flatten(1) for g in found.values()], 1)

    def states(self) -> list[int]:
        return np.linspace(self.run.steps / CHECKPOINTS, self.run.steps, CHECKPOINTS).astype(int).tolist()

    @cached_property
    def rates(self) -> list[float]:
        """The learning rate of every step, and that of the last once more."""
        column = self.run.rules[0].hyper.index("lr")
        found = self.run.reader.read("hyper", slice(0, self.run.steps))[:, 0, column].tolist()
        return [*found, found[-1]]


def _log_prob(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return -loss(model, x, y)


def trained(name: str, seed: int, folder: Path, steps: int | None) -> Case:
    """From the folder where it was trained already."""
    setting = SETTINGS[name]
    folder = folder / name.replace(" ", "-") / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    data = setting.data()
    if (folder / "done").exists():
        model = setting.untrained()
    else:
        model, (x, y, *_) = setting.network(seed), data
        batches = ((i, x[i], y[i]) for i in setting.batches(seed, len(x))[:steps])
        optimizer, schedule = setting.optimizer(model.parameters()), setting.schedule if setting.warmup else None
        train_recorded(model, optimizer, loss, batches, folder / "run", schedule, overwrite=True)
        (folder / "done").touch()
    run = attrib.open_run(folder / "run")
    run.load(model, run.steps)
    case = Case(setting, run, model, data, folder)
    export(case)
    return case


def export(case: Case) -> None:
    """What an environment without attrib needs, in plain numpy."""
    names = ("x", "y", "query_x", "query_y")
    np.savez(case.folder / "data.npz", **{n: t.numpy() for n, t in zip(names, case.data, strict=True)})
    states = {
        f"{n}/{name}": t.numpy()
        for n, step in enumerate(case.states())
        for name, t in case.run.parameters(step).items()
    }
    np.savez(case.folder / "checkpoints.npz", **states)
    facts = {"model": case.setting.model, "arguments": case.setting.arguments()}
    facts |= {"rates": [case.rates[step] for step in case.states()], "machine": machine()}
    facts["losses"] = [float(loss(case.model, x, y).mean().detach()) for x, y in (case.data[:2], case.data[2:])]
    (case.folder / "setting.json").write_text(json.dumps(facts))


# methods: a case -> (queries, examples), positive where the example raised the query's log-probability


def accounting(case: Case) -> Any:
    result = attrib.attribute(
        case.run, case.model, case.measurement, loss=loss, keep=["example"], identities=(), progress=False
    )
    return result.by("example")


def influence(case: Case, curvature: str = "exact") -> Any:
    found = attrib.influence(case.run, case.model, case.measurement, loss=loss, curvature=curvature, progress=False)
    np.savez(case.folder / f"influence-{curvature}.npz", growth=found.growth.values, by=found.by("example").values)
    return -found.without()  # the mean is over those that remain


def difference(case: Case) -> Any:
    """To the run in which every example weighs less: each one's term, per unit of weight."""
    store, weights = case.folder / "lighter", dict.fromkeys(case.run.examples.tolist(), 1 - LIGHTER)
    changed = attrib.replay(case.run, 0, attrib.intervention.Reweight(weights), model=case.model, loss=loss,
                            store=store, overwrite=True, progress=False)  # fmt: skip
    found = attrib.difference(case.run, changed, case.model, case.measurement, loss=loss, progress=False)
    shutil.rmtree(store)
    return found.by("example") / -LIGHTER


def tracin(case: Case) -> Any:
    """Over the batches as they were: lr <grad m, grad l_i> / B at the beginning of each step."""
    x, y, query_x, query_y = case.data
    found = np.zeros((QUERIES, len(x)))
    for step in range(case.run.steps):
        index = case.run.index(step)
        dots = -case.gradients(step, query_x, query_y) @ -case.gradients(step, x[index], y[index]).T
        np.add.at(found.T, index, case.rates[step] * dots.numpy().T / len(index))
    return found[:, case.run.examples]


def gradient_dot(case: Case) -> Any:
    return _dots(case, case.run.steps)


def _dots(case: Case, step: int) -> np.ndarray:
    x, y, query_x, query_y = case.data
    rows = torch.from_numpy(case.run.examples)
    found = case.gradients(step, query_x, query_y) @ case.gradients(step, x[rows], y[rows]).T
    return np.asarray(found)


def train_loss(case: Case) -> Any:
    x, y, *_ = case.data
    rows = torch.from_numpy(case.run.examples)
    return loss(case.model, x[rows], y[rows]).detach().expand(QUERIES, -1).numpy()


def chance(case: Case) -> Any:
    return np.random.default_rng(0).standard_normal((QUERIES, len(case.run.examples)))


METHODS: dict[str, Callable[[Case], Any]] = {
    "influence": influence,
    "influence, Gauss-Newton": partial(influence, curvature="gauss-newton"),
    "difference": difference,
    "accounting": accounting,
    "TracIn, every step": tracin,
    "gradient dot": gradient_dot,
    "train loss": train_loss,
    "random": chance,
}


def score(case: Case, methods: list[str]) -> None:
    """By those methods whose scores are not there yet; with the seconds of CPU that it took."""
    for name, method in METHODS.items():
        place = case.folder / "own" / f"{name}.npz"
        if name in methods and not place.exists():
            start = time.process_time()
            place.parent.mkdir(exist_ok=True)
            scores = np.asarray(method(case))
            np.savez(place, scores=scores, seconds=time.process_time() - start)


def retrain(case: Case, share: float, count: int, weight: float | None = None) -> None:
    """Without each of `count` random parts of the examples; or with these weighing `weight`."""
    subsets = attrib.random_subsets(case.run, share, count, seed=int(1000 * share))
    store = case.folder / f"outcomes-{share:g}-{count}{'' if weight is None else f'-weight{weight:g}'}.jsonl"
    attrib.retrain_subsets(
        case.run, subsets, case.measurement, model=case.model, loss=loss, weight=weight, store=store, progress=False
    )


def peers(command: str, folders: list[Path]) -> None:
    script = Path(__file__).parent / "peers" / "score.py"
    subprocess.run([*shlex.split(command), str(script), *map(str, folders)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--retrainings", type=int, default=50)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.01, 0.05, 0.2, 0.5])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--weights", nargs="*", type=float, default=[], help="weigh the smallest share so, too")
    parser.add_argument("--steps", type=int, help="train so many only")
    parser.add_argument("--folder", type=Path, default=Path("influence-out"))
    parser.add_argument("--peers", help="the command of a Python that has the other packages")
    parser.add_argument("--quick", action="store_true", help="two settings, one seed, 10 retrainings of 20 steps")
    options = parser.parse_args()
    if options.quick:
        options.settings, options.seeds, options.retrainings, options.steps = ["mlp sgd gelu", "gpt"], [0], 10, 20
        options.shares, options.folder = [0.05, 0.2], options.folder / "quick"
    for name in options.settings:
        cases = [work(name, seed, options) for seed in options.seeds]
        if options.peers:
            peers(options.peers, [case.folder for case in cases])
        print(printed(options.folder, name), flush=True)


def work(name: str, seed: int, options: argparse.Namespace) -> Case:
    case = trained(name, seed, options.folder, options.steps)
    for share in options.shares:
        retrain(case, share, options.retrainings)
    for weight in options.weights:
        retrain(case, min(options.shares), options.retrainings, weight)
    score(case, options.methods)
    return case


if __name__ == "__main__":
    main()
