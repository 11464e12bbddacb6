"""How well scores per example foretell what leaving examples out does: the linear datamodelling score of many methods.

    python scripts/bench_influence.py --settings "mlp sgd gelu" "mlp adamw gelu" --folder influence-out
    python scripts/bench_influence.py --quick

Per setting and seed a network is trained and recorded, trained again without 1, 5, 20 and 50 % of its examples, 50 times
each, and every method's scores are held against the outcomes: Spearman's correlation over the retrainings, its mean over the
queries and seeds, and an interval by resampling the retrainings. What is done stays done: started again it goes on.

Other packages run in an environment of their own (scripts/peers/requirements.txt says how it is made). With
`--peers "PYTHON"`, the command of its Python, this script calls `scripts/peers/score.py` with it; or call that by hand on
FOLDER/*/seed*, and this script again. The data, states and network of each setting are written there.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from models import MODELS, loss

import attrib
from attrib.studies import digits, modular, text
from attrib.studies.recipe import train_recorded

QUERIES, CHECKPOINTS = 20, 5
CHARACTERS = text.load(32, 20_000)


@dataclass(frozen=True)
class Setting:
    """A network, how it is trained, on what. data: () -> x, y of the examples, then of the queries."""

    model: str
    arguments: dict[str, Any]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    data: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]
    steps: int
    batch: int | None = None  # None: all examples
    warmup: int = 0

    def batches(self, seed: int, count: int) -> list[Tensor]:
        if self.batch is None:
            return [torch.arange(count)] * self.steps
        rng, found = torch.Generator().manual_seed(seed), []
        while len(found) < self.steps:
            found += torch.randperm(count, generator=rng).split(self.batch)
        return found[: self.steps]


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = digits.load(500)
    test = data.test[:QUERIES]
    return data.x[data.train].double(), data.y[data.train], data.x[test].double(), data.y[test]


def _text() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = CHARACTERS
    train, test = torch.arange(512), torch.arange(512, 512 + QUERIES)
    return *data.passages(train), *data.passages(test)


def _sums() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = modular.ordered_pairs(31, 0.5, 0)
    test = data.test[torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:QUERIES]]
    return data.x[data.train], data.y[data.train], data.x[test], data.y[test]


def _sgd(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3)


def _adamw(p: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=3e-3, weight_decay=1e-2)


def _slow_adamw(p: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))


def _grokking(p: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=0.01, weight_decay=1.0, betas=(0.9, 0.98))


SETTINGS = {
    **{
        f"{kind.lower()} {name} {activation}": Setting(kind, {"activation": activation}, optimizer, _digits, 200, 50)
        for kind in ("Mlp", "Cnn")
        for name, optimizer in (("sgd", _sgd), ("adamw", _adamw))
        for activation in ("gelu", "relu")
    },
    "gpt": Setting("Gpt", {"vocabulary": len(CHARACTERS.alphabet), "length": 32}, _slow_adamw, _text, 160, 32, 20),
    "sums before grokking": Setting("Pairs", {"activation": "relu"}, _grokking, _sums, 300),
    "sums after grokking": Setting("Pairs", {"activation": "relu"}, _grokking, _sums, 1500),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A setting trained with a seed. folder: of its run, its outcomes and scores."""

    setting: Setting
    run: attrib.Run
    model: nn.Module
    data: tuple[Tensor, Tensor, Tensor, Tensor]
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
    torch.manual_seed(seed)
    model, data = MODELS[setting.model](**setting.arguments).double(), setting.data()
    if not (folder / "done").exists():
        x, y, *_ = data
        index = setting.batches(seed, len(x))[:steps]
        schedule = None
        if setting.warmup:
            schedule = lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.05, total_iters=setting.warmup)  # noqa: E731
        batches = ((i, x[i], y[i]) for i in index)
        optimizer = setting.optimizer(model.parameters())
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
    facts = {"model": case.setting.model, "arguments": case.setting.arguments}
    facts["rates"] = [case.rates[step] for step in case.states()]
    (case.folder / "setting.json").write_text(json.dumps(facts))


# methods: a case -> (queries, examples), positive where the example raised the query's log-probability


def accounting(case: Case) -> Any:
    result = attrib.attribute(
        case.run, case.model, case.measurement, loss=loss, keep=["example"], identities=(), progress=False
    )
    return result.by("example")


def influence(case: Case) -> Any:
    found = attrib.influence(case.run, case.model, case.measurement, loss=loss, progress=False)
    return -found.without()  # the mean is over those that remain


def difference(case: Case, lighter: float = 0.2) -> Any:
    """To the run in which every example weighs less: each one's term, per unit of weight."""
    weights = dict.fromkeys(case.run.examples.tolist(), 1 - lighter)
    changed = attrib.replay(case.run, 0, attrib.intervention.Reweight(weights), model=case.model, loss=loss,
                            store=case.folder / "lighter", overwrite=True, progress=False)  # fmt: skip
    found = attrib.difference(case.run, changed, case.model, case.measurement, loss=loss, progress=False)
    return found.by("example") / -lighter


def tracin(case: Case) -> Any:
    """Over the batches as they were: lr <grad m, grad l_i> / B at the beginning of each step."""
    found = np.zeros((QUERIES, len(case.run.examples)))
    x, y, query_x, query_y = case.data
    for step in range(case.run.steps):
        index = case.run.index(step)
        dots = -case.gradients(step, query_x, query_y) @ -case.gradients(step, x[index], y[index]).T
        np.add.at(found.T, index, case.rates[step] * dots.numpy().T / len(index))
    return found[:, case.run.examples]


def tracin_checkpoints(case: Case) -> Any:
    return sum(case.rates[step] * _dots(case, step) for step in case.states())


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
    "difference": difference,
    "accounting": accounting,
    "TracIn, every step": tracin,
    "TracIn, 5 states": tracin_checkpoints,
    "gradient dot": gradient_dot,
    "train loss": train_loss,
    "random": chance,
}
NEEDED = {"influence": "influence", "difference": "difference"}  # method -> the name in attrib it stands on


def scores_of(case: Case) -> dict[str, Any]:
    """Of every method, from the folder where they are there already; those of other packages from theirs."""
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        if name in NEEDED and not hasattr(attrib, NEEDED[name]):
            print(f"  {name}: skipped, there is no attrib.{NEEDED[name]} yet", flush=True)
            continue
        place = case.folder / "own" / f"{name}.npz"
        if not place.exists():
            start = time.process_time()
            place.parent.mkdir(exist_ok=True)
            np.savez(place, scores=np.asarray(method(case)), seconds=time.process_time() - start)
        found[name] = np.load(place)["scores"]
    for place in sorted((case.folder / "scores").glob("*.npz")):
        found[place.stem] = np.load(place)["scores"][:, case.run.examples]
    return found


def outcomes_of(case: Case, share: float, count: int) -> attrib.Outcomes:
    subsets = attrib.random_subsets(case.run, share, count, seed=int(1000 * share))
    return attrib.retrain_subsets(
        case.run,
        subsets,
        case.measurement,
        model=case.model,
        loss=loss,
        store=case.folder / f"outcomes-{share:g}-{count}.jsonl",
    )


def peers(command: str, folders: list[Path]) -> None:
    script = Path(__file__).parent / "peers" / "score.py"
    subprocess.run([*shlex.split(command), str(script), *map(str, folders)], check=True)


def table(name: str, cases: list[Case], shares: list[float], count: int) -> None:
    """Prints, per method and share: the mean over queries and seeds, and its interval."""
    found: dict[str, dict[float, list[Any]]] = {}
    for case in cases:
        scores = scores_of(case)
        for share in shares:
            outcomes = outcomes_of(case, share, count)
            for method, values in scores.items():
                held = attrib.lds(values, None, outcomes, examples=case.run.examples)
                found.setdefault(method, {}).setdefault(share, []).append(held)
    print(f"\n{name}: {len(cases)} seeds, {count} retrainings each, {QUERIES} queries")
    print(f"{'left out':24s}" + "".join(f"{share:>22.0%}" for share in shares))
    for method, rows in found.items():
        print(f"{method:24s}" + "".join(f"{_cell(rows[share]):>22s}" for share in shares), flush=True)


def _cell(seeds: list[Any]) -> str:
    """The seeds' retrainings are independent: the variances of their means add."""
    mean = float(np.mean([float(s["mean"]) for s in seeds]))
    half = np.array([float(s["mean_high"] - s["mean_low"]) / 2 for s in seeds])
    spread = float(np.sqrt((half**2).sum())) / len(seeds)
    return f"{mean:.2f} ({max(-1.0, mean - spread):.2f} to {min(1.0, mean + spread):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--retrainings", type=int, default=50)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.01, 0.05, 0.2, 0.5])
    parser.add_argument("--steps", type=int, help="train so many only")
    parser.add_argument("--folder", type=Path, default=Path("influence-out"))
    parser.add_argument("--peers", help="the command of a Python that has the other packages")
    parser.add_argument("--quick", action="store_true", help="two settings, one seed, 10 retrainings of 20 steps")
    options = parser.parse_args()
    if options.quick:
        options.settings, options.seeds, options.retrainings, options.steps = ["mlp sgd gelu", "gpt"], 1, 10, 20
        options.shares, options.folder = [0.05, 0.2], options.folder / "quick"
    for name in options.settings:
        cases = [trained(name, seed, options.folder, options.steps) for seed in range(options.seeds)]
        if options.peers:
            peers(options.peers, [case.folder for case in cases])
        table(name, cases, options.shares, options.retrainings)


if __name__ == "__main__":
    main()
