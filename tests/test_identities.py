"""Faults of the past put back by hand: each must be found by one of the five identities, not only by a test of its own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attrib.kernels.factors import Dense, Outer
from test_along import Bag, Between, Checkpointed, Sorted, by_lengths, cross_entropy, data, layout_of, normed, seeded
from torch import Tensor, fx, nn

import attrib
from attrib import errors
from attrib.functional import Functional
from attrib.gradients import assignment, examples, forms, functions
from attrib.gradients.batchwise import Batchwise
from attrib.path import graph, measured, rules, secant, special
from attrib.shares import Shares
from attrib.verify import verify

Patch = pytest.MonkeyPatch
aten = torch.ops.aten


def record(
    tmp_path: Path,
    model: nn.Module,
    loss: Callable[..., Tensor] = cross_entropy,
    capture: str = "replay",
    **options: Any,
) -> attrib.Run:
    """Eight steps; the rows of the first batch stand in the order of their first feature."""
    model.double()
    recorder = attrib.record(
        torch.optim.SGD(model.parameters(), lr=0.1), model, loss, tmp_path / "run", capture, **options
    )
    with recorder:
        for step in range(8):
            x, y = data(step)
            order = x[:, 0].argsort(descending=True)
            x, y = (x[order], y[order]) if step == 0 else (x, y)
            seeded(step)
            recorder.zero_grad()
            loss(model, x, y).mean().backward()
            recorder.step(torch.arange(9) + 9 * step, x, y)
    return attrib.open_run(tmp_path / "run")


def explain(
    run: attrib.Run, model: nn.Module, loss: Callable[..., Tensor] = cross_entropy, **options: Any
) -> attrib.Result:
    x, y = data(50, options.pop("queries", 3))
    return attrib.attribute(run, model, attrib.measure.log_prob(x, y), loss=loss, progress=False, **options)


def trusting(patch: Patch) -> None:
    """Rows are taken to be in the order of the examples, and that is held against nothing."""
    patch.setattr(assignment, "find", lambda *given: Batchwise(0))
    patch.setattr(forms, "unproven", lambda trace, plan: {})
    patch.setattr(examples, "ownership", lambda *given: {})
    patch.setattr(assignment, "_unsplit", lambda *given: None)


def test_rows_that_change_places_are_found_by_the_split(tmp_path: Path, monkeypatch: Patch) -> None:
    model = Sorted()
    run = record(tmp_path, model)
    trusting(monkeypatch)
    result = explain(run, model)
    assert float(abs(result.residual).max()) < 1e-12
    assert result.ledger().identities["batch"] < 1e-12
    with pytest.raises(errors.SplitIdentityError, match=r"at step \d, example \d+, group '[ab]\.(weight|bias)'"):
        result.check()


@pytest.mark.parametrize("capture", ["gradients", "factors"])
def test_rows_that_change_places_are_found_while_recording(tmp_path: Path, monkeypatch: Patch, capture: str) -> None:
    trusting(monkeypatch)
    monkeypatch.setattr(forms, "assigned", lambda *given: _steady(*assignment.assigned(*given)))
    with pytest.raises(
        errors.SplitIdentityError, match=r"at parameter '[ab]\.(weight|bias)', slot \d of the batch, step 1"
    ):
        record(tmp_path, Sorted(), capture=capture)


def _steady(trace: Any, made: Any) -> tuple[Any, Any]:
    return trace, assignment.Assignment(made.readings, {}, made.calls)


@pytest.mark.parametrize("capture", ["replay", "gradients", "factors"])
def test_a_rule_that_gives_an_example_the_share_of_the_next_is_found_by_the_split(
    tmp_path: Path, monkeypatch: Patch, capture: str
) -> None:
    def rolled(b: Any, delta: Tensor, split: Any) -> Outer:
        left, right = functions._linear(b, delta, split)
        return Outer(left.roll(1, 0), right.roll(1, 0))

    trusting(monkeypatch)
    monkeypatch.setitem(
        functions.FUNCTIONS,
        F.linear,
        functions.Function(functions._LINEAR, {"weight": rolled, "bias": functions._bias_of_last}),
    )
    model = Between(torch.tanh)

    def account() -> None:
        explain(record(tmp_path, model, capture=capture), model).check()

    with pytest.raises(errors.SplitIdentityError, match="weight"):
        account()


def test_two_examples_exchanged_among_many_are_found_in_float32(tmp_path: Path, monkeypatch: Patch) -> None:
    """2 of 2000, in single precision: the sum over examples does not outvote them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(2000, 4), torch.randint(0, 3, (2000,))
    with attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, cross_entropy, tmp_path / "run") as recorder:
        for _ in range(2):
            recorder.zero_grad()
            cross_entropy(model, x, y).mean().backward()
            recorder.step(torch.arange(2000), x, y)
    run = attrib.open_run(tmp_path / "run")
    explain(run, model).check()
    contract = examples.ExampleGradients.contract

    def exchanged(self: Any, *given: Any) -> tuple[Tensor, Tensor]:
        losses, found = contract(self, *given)
        order = torch.arange(2000)
        order[3], order[4] = 4, 3
        return losses, found[:, order]

    monkeypatch.setattr(examples.ExampleGradients, "contract", exchanged)
    with pytest.raises(errors.SplitIdentityError, match=r"example [34],"):
        explain(run, model).check()


def test_an_operation_whose_derivative_fails_and_counts_as_none_is_found_by_the_limit(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    model = Bag()
    run = record(tmp_path, model)
    for name in (aten._embedding_bag.default, aten._embedding_bag_forward_only.default):
        monkeypatch.delitem(graph.DECOMPOSITIONS, name)
    vjp = rules._vjp

    def swallowed(node: fx.Node, c: Any, inputs: list[fx.Node], around: Any, points: list[Tensor]) -> list[Tensor]:
        try:
            return vjp(node, c, inputs, around, points)
        except RuntimeError:
            return [torch.zeros_like(p) * sum(ck.sum() for ck in c.values()) for p in points]

    monkeypatch.setattr(rules, "_vjp", swallowed)
    monkeypatch.setattr(secant, "_maps", lambda *given: True)
    result = explain(run, model)
    assert float(abs(result.residual).max()) < 1e-12
    with pytest.raises(errors.LimitIdentityError, match=r"query \d, parameter 'bag\.weight'"):
        result.check()


def test_numbers_turned_whole_as_if_they_were_not_are_found_by_the_limit(tmp_path: Path, monkeypatch: Patch) -> None:
    torch.manual_seed(1)
    model = nn.utils.parametrizations.orthogonal(nn.Linear(4, 3))
    run = record(tmp_path, model)
    explain(run, model).check()
    monkeypatch.setitem(special.SPECIAL, aten._to_copy, lambda node, c, ends: iter([(node.args[0], c)]))
    with pytest.raises(errors.LimitIdentityError, match="parametrizations"):
        explain(run, model).check()


def test_gradients_that_do_not_map_are_found_by_the_limit(tmp_path: Path, monkeypatch: Patch) -> None:
    """torch 2.13 maps prelu over queries and steps to something else, where there are as many of them."""
    torch.manual_seed(1)
    model = Between(nn.PReLU(6))
    run = record(tmp_path, model)
    explain(run, model, path=attrib.GaussLegendre(8), queries=2).check(1e-3)
    monkeypatch.setattr(measured, "alike", lambda *given: True)
    monkeypatch.setattr(measured.Measured, "steps_at_once", lambda self: 2)
    result = explain(run, model, path=attrib.GaussLegendre(8), queries=2)
    with pytest.raises(errors.LimitIdentityError):
        result.check(np.inf)


def test_a_backward_pass_with_other_parameters_is_found_by_the_batch(tmp_path: Path, monkeypatch: Patch) -> None:
    """What activation checkpointing computes again, it computed with the parameters that the model held."""
    model = Checkpointed()
    run = record(tmp_path, model)
    bound, run_loss = Functional.bound, Functional.run

    @contextmanager
    def forgotten(self: Functional, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        self._lent = parameters  # type: ignore[attr-defined]
        yield

    def lent(self: Functional, *given: Any) -> Any:
        with bound(self, self._lent):  # type: ignore[attr-defined]
            return run_loss(self, *given)

    monkeypatch.setattr(Functional, "bound", forgotten)
    monkeypatch.setattr(Functional, "run", lent)
    monkeypatch.setattr(forms, "unproven", lambda trace, plan: {})
    monkeypatch.setattr(secant, "_maps", lambda *given: True)
    with pytest.raises(errors.CompletenessError, match="batch identity is furthest off"):
        explain(run, model, identities=()).check()


def test_a_batch_that_is_cut_though_its_losses_depend_on_each_other_is_found_by_the_batch(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    model = normed()
    run = record(tmp_path, model)
    monkeypatch.setattr(forms.Forms, "of", lambda self, theta, batch: forms.Form(1.0, True))
    monkeypatch.setattr(forms.Forms, "assignment", lambda self, theta, trace, *given: _by_rows(trace))
    monkeypatch.setattr(
        forms.Forms, "slices", lambda self, form, batch: ((batch.take(slice(k, k + 3)), 0) for k in (0, 3, 6))
    )
    monkeypatch.setattr(Shares, "_refitted", lambda *given: None)
    result = explain(run, model.eval(), identities=())
    assert result.gap("batch") > 0.1
    with pytest.raises(errors.LossError, match="the losses are not those that were recorded"):
        result.check()


def _by_rows(trace: Any) -> Any:
    return assignment.Assignment([Batchwise(0)] * len(trace.sites), {}, assignment.calls_of(trace))


def test_a_tape_that_keeps_what_python_read_is_found_by_the_batch(tmp_path: Path, monkeypatch: Patch) -> None:
    model = Between(torch.tanh)
    run = record(tmp_path, model, by_lengths)
    explain(run, model, by_lengths).check(1e-9)
    monkeypatch.setattr("attrib.program.Tape.guard", lambda self, *given: None)
    monkeypatch.setattr("attrib.program._same", lambda *given: True)
    result = explain(run, model, by_lengths, identities=())
    with pytest.raises(errors.CompletenessError, match="batch identity is furthest off"):
        result.check()


def test_a_scale_that_was_assumed_is_found_by_the_batch(tmp_path: Path, monkeypatch: Patch) -> None:
    """A divisor that stays as it is for a shorter batch, at steps that are not checked while recording."""
    model = Between(torch.tanh).double()
    with attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, cross_entropy, tmp_path / "run") as recorder:
        for step in range(6):
            x, y = data(step, 9 if step < 5 else 4)
            recorder.zero_grad()
            (cross_entropy(model, x, y).sum() / 9).backward()
            recorder.step(torch.arange(len(x)), x, y)
    run = attrib.open_run(tmp_path / "run")
    explain(run, model).check(1e-9)
    monkeypatch.setattr(Shares, "_scales", lambda self, step, *given: np.array([p.scale for p in step.passes]))
    with pytest.raises(errors.CompletenessError, match=r"batch identity is furthest off, by .* at step 5"):
        explain(run, model).check()


@pytest.mark.parametrize("capture", ["gradients", "factors"])
def test_rows_without_the_reduction_are_found_by_the_batch_while_recording(
    tmp_path: Path, monkeypatch: Patch, capture: str
) -> None:
    watched = examples.ExampleGradients.watched

    def mixed(self: Any, theta: Tensor, batch: Any, *given: Any) -> Any:
        found = watched(self, theta, batch, *given)
        rows = {n: torch.stack([r[n] for r in self.vector.rows(theta, batch, [n])]) for n in self.layout.names[:1]}
        return found and {**found, **{n: [Dense(r)] for n, r in rows.items()}}

    monkeypatch.setattr(examples.ExampleGradients, "watched", mixed)
    with pytest.raises(errors.BatchIdentityError, match=r"'a\.weight', step 0"):
        record(tmp_path, Between(torch.tanh), capture=capture)


def test_what_is_switched_off_is_written_in_the_result(tmp_path: Path) -> None:
    model = Between(torch.tanh)
    run = record(tmp_path, model)
    for chosen in ((), ("split",), ("limit",)):
        result = explain(run, model, identities=chosen)
        known = result.check().identities
        assert {name for name in ("split", "limit") if not np.isnan(known[name])} == set(chosen)
        assert result.dataset.attrs["identities"] == ["batch", "step", "measurement", *chosen]
        assert ("not checked" in str(result.ledger())) == (len(chosen) < 2)
    with pytest.raises(ValueError, match="identities are none"):
        explain(run, model, identities=("splat",))


def test_where_no_loss_is_given_the_split_is_as_it_was_recorded(tmp_path: Path) -> None:
    model = Between(torch.tanh)
    run = record(tmp_path, model, capture="gradients", check_every=3)
    result = explain(run, model, loss=None)
    np.testing.assert_array_equal(result.dataset["split_identity"], run.log("split_identity"))
    assert list(np.flatnonzero(~np.isnan(run.log("split_identity")))) == [0, 1, 3, 6]
    assert result.check().identities["split"] < 1e-12
    assert explain(run, model).check().identities["split"] < 1e-12  # with it, anew


def test_the_loss_is_asked_for_no_more_than_a_few_passes(tmp_path: Path) -> None:
    model = Between(torch.tanh)
    run = record(tmp_path, model)
    calls: dict[tuple[str, ...], int] = {}
    for chosen in ((), ("split", "limit")):
        counted = 0

        def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            nonlocal counted
            counted += 1
            return cross_entropy(m, x, y)

        explain(run, model, loss, identities=chosen)
        calls[chosen] = counted
    assert calls[("split", "limit")] - calls[()] == 2


def test_layouts_of_every_kind_of_parameter_are_walked_once() -> None:
    """A weight made of parameters alone, doubled at every layer: its tangent is found once, not 2^40 times."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            w = self.w
            for _ in range(40):
                w = 0.5 * w + 0.5 * torch.sin(w)
            return x @ w

    model = Deep().double()
    layout, theta = layout_of(model)
    x, y = data(0)
    found = examples.ExampleGradients(cross_entropy, model, layout, torch.float64).contract(theta, (x, y), theta[None])[
        1
    ]
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("capture", ["replay", "gradients", "factors"])
def test_verify_has_the_split_where_it_has_a_loss(tmp_path: Path, monkeypatch: Patch, capture: str) -> None:
    model = Between(torch.tanh)
    run = record(tmp_path, model, capture=capture)
    plain = verify(run, progress=False)
    assert plain.failure is None
    assert ("recorded split" in plain.identities) == (capture != "replay")
    found = verify(run, progress=False, model=model, loss=cross_entropy)
    assert found.failure is None
    assert found.identities["split"][0] == 2
    assert found.identities["split"][1] < 1e-12
    contract = Shares.contract
    monkeypatch.setattr(Shares, "contract", lambda self, *given: _moved(contract(self, *given)))
    bad = verify(run, progress=False, model=model, loss=cross_entropy)
    assert bad.failure is not None
    assert "own examples" in bad.failure


def _moved(found: Any) -> Any:
    return [step._replace(values=np.roll(step.values, 1, axis=1)) for step in found]
