"""What p.grad holds beyond the shares is a row of the ledger, and nothing else is."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import ADAMW, SGD, Mlp, classify, pairs
from torch import Tensor, nn
from zarr.storage import MemoryStore

import attrib
from attrib.checks.intake import CAPTURES
from attrib.errors import BatchIdentityError, CompletenessError, LossError

STEPS, BATCH = 5, 6
Change = Callable[[nn.Module], None]


def value_clipping(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.02)


def noise(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad += 0.01 * torch.randn_like(p)


def a_scaled_subset(model: nn.Module) -> None:
    for p in list(model.parameters())[::2]:
        p.grad *= 0.3


def clipping_by_norm_and_noise(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    noise(model)


CHANGES = {f.__name__: f for f in (value_clipping, noise, a_scaled_subset, clipping_by_norm_and_noise)}


def flat(model: nn.Module) -> np.ndarray:
    return np.concatenate([p.grad.reshape(-1).double().numpy().copy() for p in model.parameters()])


def plain_gradients(model: nn.Module, x: Tensor, y: Tensor, reduction: Callable[[Tensor], Tensor]) -> np.ndarray:
    """(P,): of the loss alone, past all hooks on parameters."""
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    class Called:
        def __call__(self, x: Tensor) -> Tensor:
            return torch.func.functional_call(model, copies, (x,))

    reduction(classify(Called(), x, y)).backward()
    return np.concatenate([p.grad.reshape(-1).numpy() for p in copies.values()])


class Recorded:
    """A run, and what was done by hand at each of its steps, (T, P) in the order of the run."""

    def __init__(
        self,
        change: Change = lambda model: None,
        capture: str = "replay",
        optimizer: Callable[..., Any] = lambda p: ADAMW(p, lr=0.01, weight_decay=0.1),
        reduction: Callable[[Tensor], Tensor] = torch.mean,
        hook: Change | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = Mlp().double()
        x, y = pairs(18)
        store = MemoryStore()
        options = {"remainder": "account", "block": 2, **options}
        recorder = attrib.record(optimizer(self.model.parameters()), self.model, classify, store, capture, **options)
        if hook is not None:
            hook(self.model)
        done = []
        with recorder:
            for step in range(STEPS):
                index = torch.arange(BATCH - step % 2) + 3 * step
                recorder.zero_grad()
                reduction(classify(self.model, x[index], y[index])).backward()
                change(self.model)
                done.append(flat(self.model) - plain_gradients(self.model, x[index], y[index], reduction))
                recorder.step(index, x[index], y[index])
        self.done, self.run, self.x, self.y = np.array(done), attrib.open_run(store), x, y

    def attribute(self, **options: Any) -> attrib.Result:
        options = {"loss": classify, "progress": False, **options}
        measurement = attrib.measure.log_prob(self.x[:3], self.y[:3])
        return attrib.attribute(self.run, self.model, measurement, **options)

    def by_hand(self, sensitivities: list[np.ndarray]) -> np.ndarray:
        """<U, rho> (Q, T, K) from U (Q, P) of each step."""
        bounds = self.run.layout.bounds
        products = np.stack([u * rho for u, rho in zip(sensitivities, self.done, strict=True)], 1)
        return np.add.reduceat(products, bounds[:-1], 2)


def sensitivities(monkeypatch: pytest.MonkeyPatch, attribute: Callable[[], attrib.Result]) -> tuple[Any, list[Any]]:
    """The result, and U (Q, P) of every step in order."""
    found: dict[int, np.ndarray] = {}
    before = attrib.shares.Shares.contract

    def contract(self: Any, step: Any, sensitivity: Tensor, gradient: np.ndarray) -> Any:
        found[step.number] = sensitivity.numpy().copy()
        return before(self, step, sensitivity, gradient)

    monkeypatch.setattr(attrib.shares.Shares, "contract", contract)
    result = attribute()
    return result, [found[step] for step in sorted(found)]


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("change", CHANGES)
def test_the_remainder_is_what_was_done_by_hand(change: str, capture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(CHANGES[change], capture)
    result, traced = sensitivities(monkeypatch, recorded.attribute)
    expected = recorded.by_hand(traced)
    # sums of the same products in another order; what was done is a difference of gradients, each rounded
    np.testing.assert_allclose(result.remainder.values, expected, rtol=0, atol=1e-12 * np.abs(expected).sum())
    assert np.abs(expected).sum() > 1e-3 * np.abs(result.by()).sum()  # something was done
    ledger = result.check(1e-10)
    np.testing.assert_allclose(ledger.terms["remainder"], expected.sum((1, 2)), rtol=1e-9)


def masked(model: nn.Module) -> None:
    weight = model.hidden.weight
    weight.register_hook(lambda g: g * (torch.arange(g.numel()).view_as(g) % 3 > 0))


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("reduction", [torch.mean, torch.sum])
def test_a_hook_that_masks_one_tensor_leaves_the_others_without_remainder(capture: str, reduction: Any) -> None:
    recorded = Recorded(capture=capture, reduction=reduction, hook=masked)
    result = recorded.attribute()
    result.check(1e-10)
    by_group = np.abs(result.remainder).sum(("query", "step"))
    assert float(by_group.sel(group="hidden.weight")) > 1e-3 * float(np.abs(result.by()).sum())
    others = by_group.drop_sel(group="hidden.weight")
    assert float(others.max()) <= 1e-13 * float(result.dataset["gross"].sum())  # rounding of sums of that size
