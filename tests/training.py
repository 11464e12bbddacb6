"""Short recorded runs for the tests, with everything an oracle needs beside them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zarr
from cases import MODELS, ModelCase, Optimizers
from torch import Tensor, nn

import attrib
from attrib.store.disk import Disk
from attrib.store.reader import open_checked
from attrib.store.schema import FACTS, writable_array
from attrib.store.sealing import SealingStore


class Trained(NamedTuple):
    """run: opened. thetas (T + 1, P), in the order of model.parameters(); batches: index, x, y of each step."""

    run: attrib.Run
    model: nn.Module
    case: ModelCase
    thetas: list[np.ndarray]
    rates: list[float]
    batches: list[tuple[Tensor, Tensor, Tensor]]
    data: tuple[Tensor, Tensor]

    def measurement(self, queries: int = 2) -> attrib.measure.Measurement:
        x, y = (d[:queries] for d in self.data)
        return attrib.measure.log_prob(x, y)

    def attribute(self, measurement: Any = None, **options: Any) -> attrib.Result:
        options = {"loss": self.case.loss, "progress": False, **options}
        return attrib.attribute(self.run, self.model, measurement or self.measurement(), **options)


def flat(model: nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().reshape(-1).double().numpy() for p in model.parameters()])


def train(
    store: Path | Any,
    optimizer: Callable[[list[nn.Parameter]], Optimizers],
    model: str | ModelCase = "mlp",
    capture: str = "replay",
    dtype: torch.dtype = torch.float64,
    steps: int = 6,
    examples: int = 12,
    batch: int = 5,
    reduction: Callable[[Tensor], Tensor] = torch.mean,
    scheduler: Callable[[Any], Any] | None = None,
    clip: float | None = None,
    close: bool = True,
    called: Callable[[Tensor], Any] = lambda index: index,
    **options: Any,
) -> Trained:
    torch.manual_seed(0)
    case = MODELS[model] if isinstance(model, str) else model
    net = case.build().to(dtype)
    x, y = case.data(examples)
    x = x.to(dtype) if x.is_floating_point() else x
    inner = optimizer(list(net.parameters()))
    recorder = attrib.record(inner, net, case.loss, store, capture, **{"block": 4, **options})
    schedule = scheduler(recorder) if scheduler else None
    thetas, rates, batches = [flat(net)], [], []
    for step in range(steps):
        index = torch.randperm(examples)[: batch - step % 2]
        recorder.zero_grad()
        reduction(case.loss(net, x[index], y[index])).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        rates.append(recorder.param_groups[0]["lr"])
        recorder.step(called(index), x[index], y[index])
        if schedule is not None:
            schedule.step()
        thetas.append(flat(net))
        batches.append((index, x[index], y[index]))
    if close:
        recorder.close()
    return Trained(attrib.open_run(store), net, case, thetas, rates, batches, (x, y))


@contextmanager
def rewritten(store: Path, name: str) -> Iterator[zarr.Array]:
    """An array of a stored run, to be written to as if it had been recorded so."""
    checked, _ = open_checked(store, "run")
    sealing = SealingStore(Disk(store), checked.facts["id"], growing=True, attributes=checked.attributes)
    sealing.resume(checked.closed())
    yield writable_array(sealing, name)
    sealing.commit({key: value for key, value in checked.facts.items() if key not in ("sealed", "seal")}, full=True)


def assert_same_arrays(a: attrib.Run, b: attrib.Run, numbering: bool = True) -> None:
    """Two runs hold the same bits, but for the time that the steps took. numbering: and in the same rows of the tables of
    inputs, which are numbered as they are written."""
    assert a.reader.names() == b.reader.names()
    assert (a.steps, a.complete) == (b.steps, b.complete)
    for step in range(a.steps):
        for one, other in zip(a.passes(step), b.passes(step), strict=True):
            mine, theirs = a.inputs(one), b.inputs(other)
            assert (mine.kind, mine.numbers) == (theirs.kind, theirs.numbers)
            assert all(map(torch.equal, mine.tensors, theirs.tensors)), step
    for name in a.reader.names():
        if not numbering and (name == "row" or name.startswith(("examples/", "shared/"))):
            continue
        got, expected = a.reader.read(name), b.reader.read(name)
        if name == "facts":
            got[:, FACTS.index("seconds")] = expected[:, FACTS.index("seconds")] = 0.0
        np.testing.assert_array_equal(got, expected, err_msg=name)
