"""The same questions put to other packages: what the answer costs, in plain training, and how far it is from the change that
it explains. ExPLAIND's setting, all 4000 examples at every step.

    run     115 log-probabilities of one sum, by example, over all steps: attrib, and ExPLAIND with so many nodes a step
    state   100 log-probabilities, by example, of one step: attrib, and TracIn at its state by captum and dattri, whose
            rule is that of SGD, though AdamW trained

Error: the largest over the questions, of the largest change, in nats. Every answer is that of a fresh process; imports are
not counted, what has to be traced is, but for the steps of a state.

The environment: scripts/peers/requirements.txt.

    python scripts/bench_peers.py [NAME ...] [--steps 10] [--repeats 3]
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from settings import Setting, machine, p113, peak_of, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attrib
from attrib.studies import modular
from attrib.studies.recipe import cross_entropy

QUERIES, SUM = 100, 4100  # the sum that a run is asked about
RATE, AT = 1e-3, 2  # of the steps; and the state that is asked about
NODES = (1, 10)


class Answer(NamedTuple):
    """seconds of explaining; changes (Q,) as they were and as the package makes them of its examples' parts."""

    seconds: float
    true: Tensor
    found: Tensor


class LogProbs(nn.Module):
    """Log-probabilities of all answers."""

    def __init__(self) -> None:
        super().__init__()
        self.network = modular.PairTransformer()

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.network(x), -1)


def pairs() -> modular.Pairs:
    return modular.unordered_pairs(train=4000)


def questions() -> tuple[Tensor, Tensor]:
    data = pairs()
    return data.x[data.test[:QUERIES]], data.y[data.test[:QUERIES]]


def recorded(setting: Setting, folder: Path) -> attrib.Run:
    if not (folder / "run.zarr").exists():
        train(setting, folder / "run.zarr")
    return attrib.open_run(folder / "run.zarr")


# the run


def of_run_by_attrib(steps: int, folder: Path) -> Answer:
    setting, x = p113(steps), pairs().x[SUM : SUM + 1]
    run = recorded(setting, folder)

    def log_probs(model: nn.Module) -> Tensor:
        return torch.log_softmax(model(x)[0], -1)

    seconds, result = _attributed(run, setting, log_probs)
    return Answer(seconds, *_changes(result))


def of_run_by_explaind(steps: int, folder: Path, nodes: int) -> Answer:
    from explaind.data_paths import DataPath
    from explaind.epk_model import ExactPathKernelModel
    from explaind.model_paths import ModelPath
    from explaind.modulo_model.loss import RegularizedCrossEntropyLoss
    from explaind.optimizer_paths import AdamWOptimizerPath

    torch.manual_seed(43)
    data = pairs()
    path = ModelPath(LogProbs(), device="cpu", output_dim=data.p + 2)
    optimizer = AdamWOptimizerPath(path, lr=RATE, betas=(0.9, 0.98), weight_decay=4.0, device="cpu")
    examples = TensorDataset(data.x[data.train], data.y[data.train])
    examples.targets = [*data.y[data.train]]
    batches = DataPath(DataLoader(examples, batch_size=len(examples)), full_batch=False)
    batches.checkpoints = [
        {"X": data.x[data.train], "y": data.y[data.train], "indices": torch.arange(len(examples))}
    ] * steps
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.nll_loss(path.model(data.x[data.train]), data.y[data.train]).backward()
        optimizer.step()
        path.log_checkpoint()
        optimizer.log_checkpoint()
    explain = ExactPathKernelModel(
        path,
        optimizer,
        RegularizedCrossEntropyLoss(alpha=0.0),
        batches,
        integral_eps=1 / nodes if nodes > 1 else 1,
        early_integral_eps=None,
        early_steps=0,
        device="cpu",
        evaluate_predictions=False,
        kernel_store_interval=float("nan"),  # none is kept: at a number, 0 counts, where it has nowhere to put it yet
    )
    x = data.x[SUM : SUM + 1]
    start = time.perf_counter()
    found, first, *_ = explain.predict(x)
    seconds = time.perf_counter() - start
    last = path.forward(x, step=steps)
    return Answer(seconds, (last - first)[0].detach(), (found - first)[0].detach())


# a state


def of_state_by_attrib(steps: int, folder: Path) -> Answer:
    setting = p113(steps)
    run = recorded(setting, folder)
    measurement = attrib.measure.log_prob(*questions())
    few, several = slice(0, 1), slice(0, 1 + AT)  # a step more costs what a step costs; what it takes to begin goes
    (shorter, _), (longer, _) = (_attributed(run, setting, measurement, steps=window) for window in (few, several))
    result = _attributed(run, setting, measurement, steps=slice(AT, AT + 1))[1]
    return Answer((longer - shorter) / AT, *_changes(result))


def of_state_by_captum(steps: int, folder: Path) -> Answer:
    from captum.influence import TracInCP

    setting = p113(steps)
    run, data = recorded(setting, folder), pairs()

    def load(model: nn.Module, state: str) -> float:
        run.load(model, int(state))
        return RATE

    examples = TensorDataset(data.x[data.train], data.y[data.train])
    found = TracInCP(
        setting.model, examples, [str(AT)], load, loss_fn=nn.CrossEntropyLoss(reduction="none"), batch_size=200
    )
    start = time.perf_counter()
    scores = found.influence(questions(), show_progress=False)
    seconds = time.perf_counter() - start
    return Answer(seconds, _step_of(run, setting.model), scores.sum(1) / len(examples))


def of_state_by_dattri(steps: int, folder: Path) -> Answer:
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    setting = p113(steps)
    run, data, model = recorded(setting, folder), pairs(), setting.model

    def loss(parameters: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        x, y = example
        return nn.functional.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    run.load(model, AT)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = TracInAttributor(AttributionTask(loss, model, [state]), torch.tensor([RATE]), False, device="cpu")
    examples = DataLoader(TensorDataset(data.x[data.train], data.y[data.train]), batch_size=200)
    start = time.perf_counter()
    scores = found.attribute(examples, DataLoader(TensorDataset(*questions()), batch_size=QUERIES))
    seconds = time.perf_counter() - start
    return Answer(seconds, _step_of(run, model), scores.detach().sum(0) / len(data.train))


def _attributed(
    run: attrib.Run, setting: Setting, measurement: object, **options: object
) -> tuple[float, attrib.Result]:
    run.load(setting.model, run.steps)
    start = time.perf_counter()
    result = attrib.attribute(
        run, setting.model, measurement, loss=cross_entropy, keep=("example",), progress=False, **options
    )
    return time.perf_counter() - start, result


def _changes(result: attrib.Result) -> tuple[Tensor, Tensor]:
    """As they were, and as the rows add up to them."""
    change, residual = (result.final - result.initial), result.residual
    return torch.as_tensor(change.to_numpy()), torch.as_tensor((change - residual).to_numpy())


def _step_of(run: attrib.Run, model: nn.Module) -> Tensor:
    """(Q,): what the step did to the log-probabilities."""
    measured = attrib.evaluate(run, model, attrib.measure.log_prob(*questions()), states=[AT, AT + 1])
    return torch.as_tensor(measured.to_numpy()).diff(dim=0)[0]


def of_training(steps: int, folder: Path) -> Answer:
    nothing = torch.zeros(1)
    return Answer(train(p113(steps)), nothing, nothing)


ROWS: dict[str, tuple[Callable[..., Answer], tuple[int, ...]]] = {
    "training": (of_training, ()),
    "run, attrib": (of_run_by_attrib, ()),
    **{f"run, ExPLAIND, {nodes} nodes": (of_run_by_explaind, (nodes,)) for nodes in NODES},
    "state, attrib": (of_state_by_attrib, ()),
    "state, captum TracInCP": (of_state_by_captum, ()),
    "state, dattri TracIn": (of_state_by_dattri, ()),
}


def quietly(work: Callable[..., Answer], threads: int, *arguments: object) -> Answer:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return work(*arguments)


def put(name: str, steps: int, folder: Path) -> tuple[Answer, float]:
    """The answer of a fresh process, and the MiB that it took at most."""
    work, rest = ROWS[name]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        answer = pool.submit(quietly, work, torch.get_num_threads(), steps, folder, *rest).result()
        return answer, peak_of(pool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(machine())
    found: dict[str, list[tuple[Answer, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            for name in ["training", *(n for n in options.names if n != "training")]:
                try:
                    found.setdefault(name, []).append(put(name, options.steps, Path(folder)))
                except Exception as error:  # a package that fails, or is not installed, says why, and the others go on
                    print(f"{name}: {type(error).__name__}: {error}")
    for name, answers in found.items():
        # of a state, of the training of one step
        units = options.steps if name.startswith("state") else 1
        plain = [t.seconds for t, _ in found["training"]]
        ratios = [a.seconds * units / t for (a, _), t in zip(answers, plain, strict=True)]
        answer, peak = answers[-1]
        off = (answer.found - answer.true).abs()
        size = float(answer.true.abs().mean())
        print(
            f"{name:26s} {statistics.median(a.seconds for a, _ in answers):8.2f} s {statistics.median(ratios):8.2f} x"
            f" ({min(ratios):.2f}-{max(ratios):.2f})  peak {peak:6.0f} MiB"
            + (f"  error {float(off.max()):.1e} of {float(answer.true.abs().max()):.2g} nats" if size else "")
        )


if __name__ == "__main__":
    main()
