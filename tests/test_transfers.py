"""How often a sweep waits for values, which an accelerator would have to hand over: counted on the CPU where Python asks."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cases import OPTIMIZERS
from torch.overrides import TorchFunctionMode
from training import Trained, train

import attrib
from attrib.gradients import several

# calls by which a value leaves a tensor, or the tensor its device
READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "equal",
    "allclose",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
}


class Waits(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            frame = sys._getframe(1)
            self.found[f"{name} at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1
        return func(*args, **(kwargs or {}))


def waits(trained: Trained, last: int) -> Counter[str]:
    """Of attributing the first steps, by where it waits."""
    x, y = trained.case.data(12)
    measurement, heard = attrib.measure.log_prob(x[:1], y[:1]), Waits()
    options: dict[str, Any] = {"loss": trained.case.loss, "steps": slice(0, last), "identities": (), "progress": False}
    with heard:
        attrib.attribute(trained.run, trained.model, measurement, **options)
    return heard.found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("transfers") / "run", OPTIMIZERS["adamw"], steps=96, examples=64, block=96)


def of_64_steps(trained: Trained) -> int:
    """What 96 steps take beyond 32 of them, which are begun in the same way."""
    more = waits(trained, 96) - waits(trained, 32)
    assert all(count % 4 == 0 for count in more.values()), more  # of steps, and of nothing else
    return sum(more.values())


def test_steps_that_are_taken_together_wait_for_their_shares_alone(trained: Trained) -> None:
    """Of 16: whether the losses are finite, the shares handed over (`cpu`, `numpy`), the mean losses."""
    assert of_64_steps(trained) == 64 // 16 * 4


def test_a_step_by_itself_waits_for_its_shares_and_its_losses(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "LEAST", 1 << 30)
    assert of_64_steps(trained) == 64 * 4
