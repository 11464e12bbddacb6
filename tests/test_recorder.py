"""The recorder: an optimizer like the user's own; what is bad is refused and leaves everything as it was."""

import logging
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import MODELS, OPTIMIZERS, covering, crossed
from torch import Tensor, nn
from training import assert_same_arrays, flat, train

import attrib
from attrib import errors
from attrib.batch import Batch
from attrib.capture import Settled
from attrib.checks.intake import CAPTURES
from attrib.losses import check_losses
from attrib.store import creation

LOSS = MODELS["mlp"].loss


class Bench:
    """A model in mid-recording, one good step behind it."""

    def __init__(self, tmp_path: Path, loss: Any = LOSS, drop: float = 0.0, **options: Any) -> None:
        torch.manual_seed(0)
        between = nn.Dropout(drop) if drop else nn.ReLU()
        self.model = nn.Sequential(nn.Linear(3, 4), between, nn.Linear(4, 2)).double()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.store = tmp_path / "run"
        self.recorder = attrib.record(self.optimizer, self.model, loss, self.store, block=2, **options)
        self.index: Any = torch.arange(5)
        self.x, self.y = torch.randn(5, 3).double(), torch.randint(0, 2, (5,))
        self.loss = loss

    def backward(self) -> None:
        self.recorder.zero_grad()
        self.loss(self.model, self.x, self.y).mean().backward()

    def step(self) -> None:
        self.recorder.step(self.index, self.x, self.y)

    def good_step(self) -> None:
        self.backward()
        self.step()

    def assert_refused(self, error: type[Exception], match: str, *arguments: Any) -> None:
        """The step raises; parameters, optimizer state and the number of steps are as they were; a good one follows."""
        before, steps = flat(self.model), self.recorder._writer.steps
        state = {k: v.clone() for s in self.optimizer.state.values() for k, v in s.items()}
        with pytest.raises(error, match=match):
            self.recorder.step(*(arguments or (self.index, self.x, self.y)))
        np.testing.assert_array_equal(flat(self.model), before)
        after = {k: v for s in self.optimizer.state.values() for k, v in s.items()}
        assert all(torch.equal(state[k], after[k]) for k in state)
        assert self.recorder._writer.steps == steps


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    b = Bench(tmp_path)
    b.good_step()
    return b


BAD_INDEX = {
    "wrong length": (torch.arange(4), "differ in length"),
    "float": (torch.arange(5).float(), "not integer"),
    "bool": (torch.ones(5, dtype=torch.bool), "not integer"),
    "negative": (torch.arange(5) - 1, "negative: got -1"),
    "matrix": (torch.zeros(5, 1, dtype=torch.long), r"got shape \(5, 1\)"),
    "empty": ([], "not a list of ids"),
    "strings after numbers": (list("abcde"), "got strings, expected numbers"),
    "strings and numbers": (["a", "b", "c", "d", 5], "got 5 of type int, expected strings"),
    "bytes": ([b"a", b"b", b"c", b"d", b"e"], r"got b'a' of type bytes.*Decode it"),
    "bytes of numpy": (np.array([b"a", b"b", b"c", b"d", b"e"]), r"got b'a' of type bytes.*Decode it"),
    "a string": ("abcde", r"not a list of ids: got shape \(\)"),
    "half a surrogate pair": (["a", "b", "\ud800", "d", "e"], "no text.*at slot 2"),
    "an end": (["a", "b", "c", "d", "e\0"], "holds a NUL.*at slot 4"),
    "too large in a list": ([0, 1, 2, 3, 2**64], "integers from 0 to"),
}


@pytest.mark.parametrize("kind", BAD_INDEX)
def test_bad_index_is_refused(kind: str, bench: Bench) -> None:
    index, match = BAD_INDEX[kind]
    bench.backward()
    bench.assert_refused(errors.BatchError, match, index, bench.x, bench.y)
    bench.good_step()


def test_a_run_of_strings_refuses_numbers_and_a_refused_first_step_decides_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.backward()
    bench.assert_refused(errors.BatchError, "differ in length", torch.arange(4), bench.x, bench.y)
    bench.index = list("abcde")
    bench.good_step()
    bench.backward()
    bench.assert_refused(errors.BatchError, "got numbers, expected strings", torch.arange(5), bench.x, bench.y)
    bench.good_step()
    bench.recorder.close()
    assert attrib.open_run(bench.store).index(1).tolist() == bench.index


def test_ids_may_change_after_the_step(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.index = np.array(list("abcde"), dtype=object)
    bench.good_step()
    bench.index[:] = list("fghij")
    bench.good_step()
    bench.recorder.close()
    assert [list(attrib.open_run(bench.store).index(s)) for s in (0, 1)] == [list("abcde"), list("fghij")]


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ((), "batch is missing"),
        (("x",), "no rows"),
        ((torch.tensor(1.0),), "no rows"),
        ((np.ones(5),), "got ndarray.*at argument 0"),
    ],
)
def test_bad_batch_is_refused(batch: tuple[Any, ...], match: str, bench: Bench) -> None:
    bench.backward()
    bench.assert_refused(errors.BatchError, match, bench.index, *batch)


def test_inputs_that_hold_no_plain_numbers_are_refused(bench: Bench) -> None:
    bench.backward()
    bench.assert_refused(
        errors.BatchError, r"got Tensor of .*sparse.*at argument 1", bench.index, bench.x, bench.y.to_sparse()
    )


def test_random_loss_that_bypasses_the_model_call_is_refused(tmp_path: Path) -> None:
    def noisy(m: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(m[2](torch.dropout(m[0](x), 0.5, True)), y, reduction="none")

    bench = Bench(tmp_path, loss=noisy)
    bench.backward()
    before = torch.get_rng_state()
    bench.assert_refused(errors.BatchIdentityError, "sum to p.grad")
    assert torch.equal(before, torch.get_rng_state())


def test_ids_beyond_int64_are_refused(bench: Bench) -> None:
    bench.backward()
    index = np.array([5, 6, 7, 8, 2**63 + 1], dtype=np.uint64)
    bench.assert_refused(errors.BatchError, r"too large.*slot 4", index, bench.x, bench.y)


def test_sparse_gradient_is_named(tmp_path: Path) -> None:
    model = nn.Embedding(5, 2, sparse=True).double()
    recorder = attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, LOSS, tmp_path / "run")
    x, y = torch.arange(4), torch.zeros(4, dtype=torch.long)
    LOSS(model, x, y).mean().backward()
    with pytest.raises(errors.BatchIdentityError, match=r"sparse.*'weight'"):
        recorder.step(x, x, y)


def test_frozen_layers_in_the_optimizer_and_gradual_unfreezing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, check_every=1)
    bench.model[0].requires_grad_(False)
    for step in range(6):
        bench.model[0].requires_grad_(step >= 3)
        bench.good_step()
    bench.recorder.close()
    run = attrib.open_run(bench.store)
    measurement = attrib.measure.log_prob(bench.x[:2], bench.y[:2])
    result = attrib.attribute(run, bench.model, measurement, loss=LOSS, progress=False)
    result.check(1e-10)
    early = result.by("step", "group").sel(group="0.weight")
    assert not early.isel(step=slice(0, 3)).any()
    assert early.isel(step=slice(3, None)).any()


def test_a_run_may_converge(tmp_path: Path) -> None:
    """At the optimum of a full batch the gradient cancels to rounding; its shares do not."""
    torch.manual_seed(0)
    model = nn.Linear(5, 1)
    x = torch.randn(40, 5)
    y = x @ torch.randn(5, 1) + torch.randn(40, 1)

    def squares(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (m(x) - y).square().sum(1)

    with attrib.record(
        torch.optim.SGD(model.parameters(), lr=0.2), model, squares, tmp_path / "run", check_every=20
    ) as r:
        for _ in range(201):
            r.zero_grad()
            squares(model, x, y).mean().backward()
            r.step(torch.arange(40), x, y)
    assert float(model.weight.grad.norm()) < 1e-6
    run = attrib.open_run(tmp_path / "run")
    # updates below the spacing of float32 do not move the parameters: a hundred such steps are rounding that adds up
    attrib.attribute(run, model, attrib.measure.loss(x[:2], y[:2], squares), loss=squares, progress=False).check(1e-4)


def test_models_may_be_copied_while_they_are_recorded(bench: Bench) -> None:
    import copy

    copied = copy.deepcopy(bench.model)
    averaged = torch.optim.swa_utils.AveragedModel(bench.model)
    bench.good_step()
    averaged.update_parameters(bench.model)
    copied(bench.x).sum().backward()
    with pytest.raises(errors.AttribError, match="cannot be copied"):
        copy.deepcopy(bench.recorder)
    bench.good_step()
    bench.recorder.close()
    assert attrib.open_run(bench.store).steps == 3


def test_dropout_that_begins_later_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Linear(4, 2)).double()
    recorder = attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, LOSS, tmp_path / "other")
    x, y = torch.randn(5, 3).double(), torch.randint(0, 2, (5,))
    for step in range(2):
        model[1].p = 0.5 * step
        recorder.zero_grad()
        LOSS(model, x, y).mean().backward()
        if step:
            with pytest.raises(errors.ChangedOutsideError, match="draws random numbers now"):
                recorder.step(torch.arange(5), x, y)
        else:
            recorder.step(torch.arange(5), x, y)


def test_two_random_passes_in_a_step_are_told_apart_from_a_penalty(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    recorder = attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, LOSS, tmp_path / "run")
    x, y = torch.randn(6, 3).double(), torch.randint(0, 2, (6,))
    for half in (slice(0, 3), slice(3, 6)):
        (LOSS(model, x[half], y[half]).sum() / 6).backward()
    with pytest.raises(errors.BatchIdentityError, match=r"made 2 forward passes and the loss draws random numbers"):
        recorder.step(torch.arange(6), x, y)


def test_index_may_be_a_list_or_an_array(bench: Bench) -> None:
    for index in ([4, 3, 2, 1, 0], np.arange(5, dtype=np.int32)):
        bench.backward()
        bench.recorder.step(index, bench.x, bench.y)
    bench.recorder.close()
    np.testing.assert_array_equal(attrib.open_run(bench.store).index(1), [4, 3, 2, 1, 0])


def test_penalty_in_the_loss_is_named(bench: Bench) -> None:
    bench.recorder.zero_grad()
    penalty = 0.01 * bench.model[2].weight.square().sum()
    (LOSS(bench.model, bench.x, bench.y).mean() + penalty).backward()
    bench.assert_refused(errors.BatchIdentityError, r"do not sum to p\.grad.*'2\.weight'")
    bench.good_step()


def test_stale_gradient_is_named(bench: Bench) -> None:
    bench.backward()
    bench.model[0].bias.grad += 0.1
    bench.assert_refused(errors.BatchIdentityError, r"'0\.bias'|different factors")


def test_second_backward_without_zero_grad_is_named(bench: Bench) -> None:
    bench.backward()
    LOSS(bench.model, bench.x[:2], bench.y[:2]).mean().backward()
    bench.assert_refused(errors.BatchIdentityError, "sum to p.grad")


def test_another_batch_than_the_one_backpropagated_is_named(bench: Bench) -> None:
    bench.backward()
    bench.assert_refused(errors.BatchIdentityError, "batch other than", bench.index, bench.x + 1, bench.y)


def test_clipping_by_value_is_refused(bench: Bench) -> None:
    bench.backward()
    nn.utils.clip_grad_value_(bench.model.parameters(), 0.01)
    bench.assert_refused(errors.BatchIdentityError, "different factors|sum to p.grad")


def test_missing_backward_is_named(bench: Bench) -> None:
    bench.recorder.zero_grad()
    bench.assert_refused(errors.BatchIdentityError, "backward")


@pytest.mark.parametrize(
    ("values", "finite"), [((3e38, 3e38), True), ((torch.inf, -torch.inf), False), ((0.0, torch.nan), False)]
)
def test_losses_are_finite_where_each_is_whatever_their_sum(values: tuple[float, float], finite: bool) -> None:
    losses = torch.tensor(values, dtype=torch.float32)  # up to 3.4e38: the sum of two of 3e38 is none
    with nullcontext() if finite else pytest.raises(errors.LossError, match="not finite"):
        assert check_losses(losses, Batch.of((losses,))) is losses


def test_infinite_loss_is_refused(bench: Bench) -> None:
    bench.x[1, 0] = torch.inf
    bench.backward()
    bench.assert_refused(errors.LossError, "not finite")
    bench.x[1, 0] = 0.0
    bench.good_step()


@pytest.mark.parametrize("capture", CAPTURES)
def test_loss_of_wrong_shape_is_refused(capture: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, loss=lambda m, x, y: LOSS(m, x, y).mean(), capture=capture)
    bench.backward()
    bench.assert_refused(errors.LossError, r"expected shape \(5,\)")
    bench.recorder.close()
    with pytest.raises(errors.StoreError, match="no run is stored there"):
        attrib.open_run(bench.store)
    assert not bench.store.exists()  # the first mistake does not stand in the way of the second try


def test_parameter_moved_outside_is_named(bench: Bench) -> None:
    bench.backward()
    with torch.no_grad():
        bench.model[2].bias += 1.0
    bench.assert_refused(errors.ChangedOutsideError, r"'2\.bias'")


def test_optimizer_state_changed_outside_is_noticed(bench: Bench) -> None:
    bench.good_step()
    for state in bench.optimizer.state.values():
        state["exp_avg"].zero_()
    bench.backward()
    bench.assert_refused(errors.ChangedOutsideError, "exp_avg")


def add_a_group(bench: Bench) -> None:
    bench.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2).double())]})


def add_a_parameter(bench: Bench) -> None:
    bench.optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2).double()))


def remove_a_parameter(bench: Bench) -> None:
    del bench.optimizer.param_groups[0]["params"][1]


def remove_a_group(bench: Bench) -> None:
    del bench.optimizer.param_groups[0]


def replace_a_parameter(bench: Bench) -> None:
    parameters = bench.optimizer.param_groups[0]["params"]
    parameters[1] = nn.Parameter(parameters[1].detach().clone())


def exchange_two_parameters(bench: Bench) -> None:
    bench.optimizer.param_groups[0]["params"].reverse()


OTHER_PARAMETERS = {
    add_a_group: "got 1 more, first in param group 1, expected the 4 of",
    add_a_parameter: "got 1 more, first in param group 0, expected the 4 of",
    remove_a_parameter: "got none of '0.bias', expected",
    remove_a_group: "got none of '0.weight', expected",
    replace_a_parameter: "got 1 more, first in param group 0 and none of '0.bias', expected",
    exchange_two_parameters: "got another order, expected",
}


@pytest.mark.parametrize("change", OTHER_PARAMETERS)
def test_other_parameters_in_the_optimizer_are_refused_and_the_steps_before_are_kept(
    change: Any, tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    for _ in range(3):
        bench.good_step()
    bench.backward()
    change(bench)
    match = f"{OTHER_PARAMETERS[change]}.*step 3.*record a new one.*refused"
    bench.assert_refused(errors.ChangedOutsideError, match)
    bench.recorder.close()
    run = attrib.open_run(bench.store)
    assert (run.steps, run.complete) == (3, True)
    assert attrib.verify(run, progress=False).failure is None


def test_after_a_group_was_added_the_optimizer_can_be_recorded_anew(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    recorded = set(bench.model[0].parameters())
    del bench.optimizer.param_groups[0]["params"][2:]
    early = attrib.record(bench.optimizer, bench.model, LOSS, tmp_path / "early")
    for step in range(4):
        if step == 2:
            bench.optimizer.add_param_group({"params": [p for p in bench.model.parameters() if p not in recorded]})
            bench.backward()
            with pytest.raises(errors.ChangedOutsideError, match="got 2 more"):
                early.step(bench.index, bench.x, bench.y)
            early.close()
            late = attrib.record(bench.optimizer, bench.model, LOSS, tmp_path / "late")
        bench.backward()
        (early if step < 2 else late).step(bench.index, bench.x, bench.y)
    late.close()
    measurement = attrib.measure.log_prob(bench.x[:2], bench.y[:2])
    for name, groups in (("early", 2), ("late", 4)):
        run = attrib.open_run(tmp_path / name)
        assert (run.steps, len(run.groups)) == (2, groups)
    attrib.attribute(run, bench.model, measurement, loss=LOSS, progress=False).check(1e-10)


def replace_a_tensor(bench: Bench) -> str:
    bench.model[2].weight = nn.Parameter(bench.model[2].weight.detach().clone())
    return r"a part of the model was replaced.*the Parameter.*'2\.weight', step 1"


def remove_a_tensor(bench: Bench) -> str:
    bench.model[2].bias = None
    return r"a part of the model was replaced.*'2\.bias'"


def replace_a_module(bench: Bench) -> str:
    bench.model[1] = nn.Tanh()
    return "a part of the model was replaced.*the ReLU.*'1', step 1"


@pytest.mark.parametrize("change", [replace_a_tensor, remove_a_tensor, replace_a_module])
def test_a_model_in_which_something_is_replaced_is_refused(change: Any, bench: Bench) -> None:
    bench.backward()
    match = change(bench)
    with pytest.raises(errors.ChangedOutsideError, match=match):
        bench.step()
    bench.recorder._writer.close(True)
    assert attrib.open_run(bench.store).steps == 1


def test_a_model_converted_to_another_type_is_refused_where_no_value_changes(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    recorder = attrib.record(torch.optim.SGD(model.parameters(), lr=0.0), model, LOSS, tmp_path / "run")
    x, y = torch.randn(4, 3).double(), torch.randint(0, 2, (4,))
    for convert in (model.double, model.float):
        convert()
        recorder.zero_grad()
        LOSS(model, x.to(model.weight.dtype), y).mean().backward()
        if convert == model.double:
            recorder.step(torch.arange(4), x, y)
    with pytest.raises(errors.ChangedOutsideError, match=r"a parameter changed between two steps.*'weight', step 1"):
        recorder.step(torch.arange(4), x, y)


def test_a_buffer_may_be_replaced_by_one_of_the_same_values(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("mask", torch.ones(3).double())

        def forward(self, x: Tensor) -> Tensor:
            self.mask = torch.ones(3).double()  # as some models make it anew in every pass
            return self.linear(x * self.mask)

    model = Masked().double()
    recorder = attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, LOSS, tmp_path / "run")
    x, y = torch.randn(4, 3).double(), torch.randint(0, 2, (4,))
    for _ in range(3):
        recorder.zero_grad()
        LOSS(model, x, y).mean().backward()
        recorder.step(torch.arange(4), x, y)
    recorder.zero_grad()
    LOSS(model, x, y).mean().backward()
    model.mask = torch.zeros(3).double()
    with pytest.raises(errors.ChangedOutsideError, match=r"buffer or frozen parameter changed.*'mask', step 3"):
        recorder.step(torch.arange(4), x, y)
    recorder.close()
    assert attrib.open_run(tmp_path / "run").steps == 3


@pytest.mark.parametrize(("lr", "match"), [(torch.tensor(1), "torch.int64"), (np.float32(0.1), "np.float32")])
def test_an_option_that_cannot_be_replayed_is_refused_before_the_optimizer_moves(
    lr: Any, match: str, tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    bench.good_step()
    bench.optimizer.param_groups[0]["lr"] = lr
    bench.backward()
    bench.assert_refused(
        errors.UnsupportedOptimizerError, rf"{match}.*'lr' of param group 0, step 1; the step was refused"
    )
    with pytest.raises(errors.UnsupportedOptimizerError, match=match):
        attrib.record(bench.optimizer, bench.model, LOSS, tmp_path / "other")
    bench.optimizer.param_groups[0]["lr"] = 0.1
    bench.good_step()
    bench.recorder.close()
    assert attrib.open_run(bench.store).steps == 2


def test_a_buffer_that_begins_to_move_in_mid_run_is_named(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x)

    model, x, y = Counting().double(), torch.randn(4, 3).double(), torch.randint(0, 2, (4,))
    recorder = attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, LOSS, tmp_path / "run")
    LOSS(model.linear, x, y).mean().backward()
    recorder.step(torch.arange(4), x, y)
    recorder.zero_grad()
    LOSS(model, x, y).mean().backward()
    with pytest.raises(errors.ChangedOutsideError, match="first step on or never, at 'calls', step 1"):
        recorder.step(torch.arange(4), x, y)
    recorder.close()


def test_mode_that_changes_is_named(bench: Bench) -> None:
    bench.backward()
    bench.model[1].eval()
    bench.assert_refused(errors.ChangedOutsideError, "train and eval.*'1'")


def test_subclass_of_an_optimizer_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    class Mine(torch.optim.SGD):
        pass

    model = nn.Linear(2, 2)
    with pytest.raises(errors.UnsupportedOptimizerError, match=r"Mine.*SGD, torch\.optim\.Adam, torch\.optim\.AdamW"):
        attrib.record(Mine(model.parameters(), lr=0.1), model, LOSS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [({"capture": "all"}, "unknown capture"), ({"check_every": 0}, "count"), ({"block": 1.5}, "count")],
)
def test_bad_options_are_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=match):
        attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, LOSS, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parameter of the model"):
        attrib.record(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), nn.Linear(2, 2), LOSS, tmp_path / "run")


def test_parameters_that_are_not_real_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"complex64.*'weight'"):
        attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, LOSS, tmp_path / "run")


def test_groups_and_state_cannot_be_swapped_in_mid_run(bench: Bench) -> None:
    with pytest.raises(errors.AttribError, match="fixed parameters"):
        bench.recorder.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(errors.ChangedOutsideError, match="mid-run"):
        bench.recorder.load_state_dict(bench.optimizer.state_dict())


def test_closed_recorder_takes_no_step(bench: Bench) -> None:
    bench.recorder.close()
    bench.recorder.close()
    bench.backward()
    bench.assert_refused(errors.AttribError, "closed")


def test_what_was_recorded_survives_an_exception_in_the_loop(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    x, y = torch.randn(4, 3), torch.randint(0, 2, (4,))

    def loop() -> None:
        with attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, LOSS, tmp_path / "run") as recorder:
            for _ in range(3):
                recorder.zero_grad()
                LOSS(model, x, y).mean().backward()
                recorder.step(torch.arange(4), x, y)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        loop()
    run = attrib.open_run(tmp_path / "run")
    assert run.steps == 3
    assert not run.complete
    assert "interrupted" in repr(run)


def test_a_last_step_that_bypasses_the_recorder_is_noticed_on_closing(bench: Bench) -> None:
    bench.backward()
    bench.optimizer.step()
    with pytest.raises(errors.ChangedOutsideError, match=r"only recorder\.step"):
        bench.recorder.close()
    assert attrib.open_run(bench.store).steps == 1


def test_closing_without_a_step_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Bench(tmp_path).recorder.close()
    assert any("never called" in message for message in caplog.messages)


SCHEDULERS = {
    "step": lambda r: torch.optim.lr_scheduler.StepLR(r, 2, 0.5),
    "lambda": lambda r: torch.optim.lr_scheduler.LambdaLR(r, lambda t: 1 / (t + 1)),
    "cosine": lambda r: torch.optim.lr_scheduler.CosineAnnealingLR(r, 4),
    "one cycle, moving betas": lambda r: torch.optim.lr_scheduler.OneCycleLR(r, 0.02, total_steps=10),
    "cyclic, moving betas": lambda r: torch.optim.lr_scheduler.CyclicLR(r, 0.001, 0.02, 2),
    "warm restarts": lambda r: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(r, 3),
    "sequential": lambda r: torch.optim.lr_scheduler.SequentialLR(
        r,
        [torch.optim.lr_scheduler.ConstantLR(r, 0.5, 2), torch.optim.lr_scheduler.ExponentialLR(r, 0.9)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize(("name", "optimizer"), crossed(SCHEDULERS, ["adamw", "sgd momentum"]))
def test_schedulers_work_on_the_recorder(name: str, optimizer: str, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS[optimizer], scheduler=SCHEDULERS[name], steps=8)
    assert len(set(trained.rates)) > 1
    trained.attribute().check(1e-10)


REDUCTIONS = {"mean": torch.mean, "sum": torch.sum, "seventh": lambda losses: losses.sum() / 7}
SCALED = [None, 0.1], REDUCTIONS, [torch.float64, torch.float32]


@pytest.mark.parametrize(("clip", "reduction", "dtype"), crossed(*SCALED, fast=covering(*SCALED, whole=2)))
def test_reduction_and_clipping_are_recognised(clip: float, reduction: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options = {"reduction": REDUCTIONS[reduction], "clip": clip, "steps": 8, "dtype": dtype}
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], **options)
    trained.attribute().check(1e-10 if dtype == torch.float64 else 1e-5)


def test_clipping_factor_is_the_scale(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"], clip=1e-3, batch=6, check_every=100, steps=5)
    for step, theta in enumerate(trained.thetas[:-1]):
        _, x, y = trained.batches[step]
        model = trained.case.build().double()
        trained.run.load(model, step)
        np.testing.assert_array_equal(flat(model), theta)
        trained.case.loss(model, x, y).mean().backward()
        norm = float(torch.sqrt(sum(p.grad.square().sum() for p in model.parameters())))
        # clip_grad_norm_ divides by norm + 1e-6
        np.testing.assert_allclose(trained.run.scales(step), 1e-3 / (norm + 1e-6) / len(x), rtol=1e-12)
    # and it was read off the norms: only the first two steps computed any shares
    np.testing.assert_array_equal(np.isnan(trained.run.log("batch_identity")), [False, False, True, True, True])


def test_training_is_not_changed_by_recording(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw amsgrad"], "gpt", scheduler=SCHEDULERS["cosine"])
    torch.manual_seed(0)
    case = MODELS["gpt"]
    model = case.build().double()
    x, y = case.data(12)
    optimizer = OPTIMIZERS["adamw amsgrad"](list(model.parameters()))
    schedule = SCHEDULERS["cosine"](optimizer)
    for step in range(6):
        index = torch.randperm(12)[: 5 - step % 2]
        optimizer.zero_grad()
        case.loss(model, x[index], y[index]).mean().backward()
        optimizer.step()
        schedule.step()
    np.testing.assert_array_equal(flat(model), trained.thetas[-1])


def test_adam_state_from_before_recording_is_inherited(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["mlp"].build().double()
    x, y = MODELS["mlp"].data(8)
    for kind in (torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)):
        optimizer = kind(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            LOSS(model, x, y).mean().backward()
            optimizer.step()
        with attrib.record(optimizer, model, LOSS, tmp_path / "run", overwrite=True) as recorder:
            for _ in range(4):
                recorder.zero_grad()
                LOSS(model, x, y).mean().backward()
                recorder.step(torch.arange(8), x, y)
        run = attrib.open_run(tmp_path / "run")
        result = attrib.attribute(run, model, attrib.measure.log_prob(x[:2], y[:2]), loss=LOSS, progress=False)
        ledger = result.check(1e-10)
        assert float(abs(ledger.inherited).min()) > 1e-3 * float(abs(ledger.final - ledger.initial).max())


def test_check_interval_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="attrib"):
        run = train(tmp_path / "run", OPTIMIZERS["sgd"], check_every=4, steps=9).run
    assert any("every 4" in message for message in caplog.messages)
    checked = np.flatnonzero(~np.isnan(run.log("batch_identity")))
    np.testing.assert_array_equal(checked, [0, 1, 4, 8])
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(run.log("step_identity"))), [0, 4, 8])  # blocks of four


def test_state_dict_is_the_optimizers_own(bench: Bench) -> None:
    assert bench.recorder.state_dict().keys() == bench.optimizer.state_dict().keys()
    assert bench.recorder.param_groups is bench.optimizer.param_groups
    assert bench.recorder.state is bench.optimizer.state
    assert bench.recorder.defaults is bench.optimizer.defaults
    assert isinstance(bench.recorder, torch.optim.Optimizer)


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_refused_step_leaves_nothing_behind_for_the_next(capture: str, tmp_path: Path) -> None:
    """Refusals of every kind between good steps: the run is the one of the good steps alone."""
    bench = Bench(tmp_path, capture=capture)
    for _ in range(5):
        bench.backward()
        bench.assert_refused(errors.BatchError, "differ", bench.index[:3], bench.x, bench.y)
        bench.model[0].bias.grad += 1.0
        bench.assert_refused(errors.BatchIdentityError, r"different factors|sum to p\.grad")
        bench.good_step()
    for state in bench.optimizer.state.values():
        state["exp_avg"].add_(1.0)
    bench.backward()
    bench.assert_refused(errors.ChangedOutsideError, "exp_avg")
    bench.recorder.close()
    run = attrib.open_run(bench.store)
    assert run.steps == 5
    assert attrib.verify(run, progress=False).failure is None
    measurement = attrib.measure.log_prob(bench.x[:2], bench.y[:2])
    attrib.attribute(run, bench.model, measurement, loss=LOSS, progress=False).check(1e-10)


Heard = list[tuple[Any, ...]]


def listen(optimizer: torch.optim.Optimizer, heard: Heard) -> None:
    """Hooks of every kind; each says its name and what it was called with."""

    def hook(kind: str) -> Any:
        return lambda *arguments: heard.append((kind, *arguments))

    for kind in ("step_pre", "step_post"):
        getattr(optimizer, f"register_{kind}_hook")(hook(kind))
    for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        getattr(optimizer, f"register_{kind}_hook")(hook(kind))


def test_hooks_on_the_recorder_and_on_the_wrapped_optimizer_are_called_once_each(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    inner, recorder = bench.optimizer, bench.recorder
    outer_heard: Heard = []
    inner_heard: Heard = []
    listen(recorder, outer_heard)
    listen(inner, inner_heard)
    state = recorder.state_dict()
    recorder.load_state_dict(state)
    names = ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]
    for heard, optimizer in ((outer_heard, recorder), (inner_heard, inner)):
        assert [kind for kind, *_ in heard] == names
        assert all(arguments[0] is optimizer for _, *arguments in heard)
        assert heard[1][2] is state
        assert heard[2][2].keys() == state.keys()
        heard.clear()
    bench.good_step()
    for heard, optimizer, arguments in (
        (outer_heard, recorder, (recorder, bench.index, bench.x, bench.y)),
        (inner_heard, inner, (inner,)),
    ):
        assert [kind for kind, *_ in heard] == ["step_pre", "step_post"]
        for _, called, positional, named in heard:
            assert called is optimizer
            assert len(positional) == len(arguments)
            assert all(a is b for a, b in zip(positional, arguments, strict=True))
            assert named == {}


def test_what_a_state_dict_hook_returns_is_taken_and_a_hook_can_be_removed(tmp_path: Path) -> None:
    recorder = Bench(tmp_path).recorder
    handle = recorder.register_state_dict_post_hook(
        lambda optimizer, state: {**state, "mine": type(optimizer).__name__}
    )
    recorder.register_load_state_dict_pre_hook(lambda optimizer, state: {k: v for k, v in state.items() if k != "mine"})
    state = recorder.state_dict()
    assert state["mine"] == "Recorder"
    recorder.load_state_dict(state)
    handle.remove()
    assert "mine" not in recorder.state_dict()


def test_a_hook_before_the_step_may_still_scale_the_gradients(tmp_path: Path) -> None:
    """Clipping in a hook: it runs before the checks read p.grad."""
    bench = Bench(tmp_path, check_every=1)

    def halve(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad *= 0.5

    bench.recorder.register_step_pre_hook(halve)
    for _ in range(3):
        bench.good_step()
    bench.recorder.close()
    run = attrib.open_run(bench.store)
    np.testing.assert_allclose(run.scales(2), 0.5 / 5, rtol=1e-12)


def test_a_hook_after_a_refused_step_is_not_called(bench: Bench) -> None:
    heard: Heard = []
    listen(bench.recorder, heard)
    bench.backward()
    bench.assert_refused(errors.BatchError, "differ in length", bench.index[:3], bench.x, bench.y)
    assert [kind for kind, *_ in heard] == ["step_pre"]


def test_the_profiler_sees_the_steps_of_both(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with torch.profiler.profile() as profile:
        bench.good_step()
    names = [event.name for event in profile.events()]
    for name in ("Optimizer.step#Recorder.step", "Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"):
        assert names.count(name) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wrapped", [False, True])
def test_schedulers_count_the_steps_and_do_not_warn(wrapped: bool, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    schedule = torch.optim.lr_scheduler.StepLR(bench.optimizer if wrapped else bench.recorder, 1, 0.5)
    for step in range(3):
        bench.good_step()
        schedule.step()
        assert bench.recorder.param_groups[0]["lr"] == bench.optimizer.param_groups[0]["lr"] == 0.01 * 0.5 ** (step + 1)
    bench.recorder.close()
    assert attrib.open_run(bench.store).steps == 3


def test_groups_and_state_stay_the_optimizers_own_after_loading(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for optimizer in (bench.optimizer, bench.recorder):
        before = bench.optimizer.param_groups
        optimizer.load_state_dict(bench.optimizer.state_dict())
        assert bench.optimizer.param_groups is not before
        assert bench.recorder.param_groups is bench.optimizer.param_groups
        assert bench.recorder.state is bench.optimizer.state
    for name in ("param_groups", "state", "defaults"):
        with pytest.raises(errors.AttribError, match=f"{name} belongs to the wrapped optimizer"):
            setattr(bench.recorder, name, type(getattr(bench.recorder, name))())
    bench.good_step()


def everything(bench: Bench) -> list[Tensor]:
    """What a step may move: parameters, gradients, accumulators, torch's generator."""
    parameters = list(bench.model.parameters())
    state = [v for s in bench.optimizer.state.values() for v in s.values()]
    return [t.clone() for t in (*parameters, *(p.grad for p in parameters), *state, torch.get_rng_state())]


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def without_a_group(bench: Bench, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("attrib.store.disk.Disk._write", no_space)


def without_some_arrays(bench: Bench, patch: pytest.MonkeyPatch) -> None:
    create, made = creation.create, []

    def some(group: Any, name: str, *rest: Any, **options: Any) -> Any:
        made.append(name)
        return create(group, name, *rest, **options) if len(made) < 8 else no_space()

    patch.setattr(creation, "create", some)


def without_a_header(bench: Bench, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("attrib.store.sealing.SealingStore.begin", no_space)


def without_memory_for_the_batch(bench: Bench, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("attrib.announced.hold", no_space)


def with_an_optimizer_that_fails(bench: Bench, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bench.optimizer, "step", no_space)


FAILURES = [
    without_a_group,
    without_some_arrays,
    without_a_header,
    without_memory_for_the_batch,
    with_an_optimizer_that_fails,
]


@pytest.mark.parametrize(("failure", "capture"), crossed(FAILURES, CAPTURES))
def test_a_first_step_that_fails_moves_nothing_and_leaves_no_store(
    failure: Any, capture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same step made afterwards is the one that would have been made."""
    bench, other = (Bench(tmp_path / name, drop=0.5, capture=capture) for name in "ab")
    torch.manual_seed(1)
    bench.backward()
    before = everything(bench)
    with monkeypatch.context() as patch:
        failure(bench, patch)
        with pytest.raises((OSError, errors.StoreError), match="No space left"):
            bench.step()
    assert all(map(torch.equal, before, everything(bench)))
    assert not bench.store.exists()
    bench.step()
    bench.good_step()
    torch.manual_seed(1)
    other.good_step()
    other.good_step()
    assert all(map(torch.equal, everything(bench), everything(other)))
    bench.recorder.close()
    other.recorder.close()
    found, want = attrib.open_run(bench.store), attrib.open_run(other.store)
    assert attrib.verify(found, progress=False).failure is None
    assert_same_arrays(found, want)


@pytest.mark.parametrize("existed", [False, True])
def test_what_is_taken_away_is_what_was_made(existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the user's stays, and so does a run that was to be replaced by one that cannot be."""
    if existed:
        (tmp_path / "run").mkdir()
    bench = Bench(tmp_path)
    bench.backward()
    with monkeypatch.context() as patch:
        without_some_arrays(bench, patch)
        with pytest.raises(errors.StoreError, match=r"cannot be made.*No space left.*refused"):
            bench.step()
    assert bench.store.exists() == existed
    bench.step()
    bench.recorder.close()
    again = Bench(tmp_path, overwrite=True)
    again.backward()
    with monkeypatch.context() as patch:
        without_a_group(again, patch)
        with pytest.raises(errors.StoreError, match="cannot be made"):
            again.step()
    assert attrib.open_run(bench.store).steps == 1
    again.step()
    again.good_step()
    again.recorder.close()
    assert attrib.open_run(bench.store).steps == 2


def test_a_store_that_came_to_be_meanwhile_is_noticed_before_the_optimizer_moves(tmp_path: Path) -> None:
    bench, other = Bench(tmp_path), Bench(tmp_path)
    other.good_step()
    other.recorder.close()
    bench.backward()
    bench.assert_refused(errors.StoreExistsError, "a store exists already")
    assert attrib.open_run(bench.store).steps == 1


def test_a_first_step_that_is_not_the_rules_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlike(*_: Any) -> float:
        raise errors.StepIdentityError("not the rule's")

    monkeypatch.setattr("attrib.loop.step_identity", unlike)
    bench = Bench(tmp_path)
    with pytest.raises(errors.StepIdentityError):
        bench.good_step()
    assert not bench.store.exists()


def test_a_block_that_is_not_written_is_noticed_before_the_optimizer_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that fills the next block waits for it."""
    bench, go = Bench(tmp_path), threading.Event()

    def late(self: Any) -> None:
        go.wait(10)
        no_space()

    monkeypatch.setattr("attrib.store.examples.ExampleTable.commit", late)
    for _ in range(3):
        bench.good_step()
    bench.backward()
    threading.Timer(0.5, go.set).start()
    bench.assert_refused(errors.StoreError, r"No space left.*step 3")


def test_a_refused_step_settles_nothing(tmp_path: Path) -> None:
    """A penalty that was not declared: its factor is not taken for the loop's, nor the shapes of a refused batch."""
    bench = Bench(tmp_path, capture="factors", check_every=100)
    bench.recorder.zero_grad()
    penalty = 0.01 * bench.model[2].weight.square().sum()
    (LOSS(bench.model, bench.x, bench.y).mean() + penalty).backward()
    bench.assert_refused(errors.BatchIdentityError, "sum to p.grad")
    assert bench.recorder._settled == Settled()
    for _ in range(4):
        bench.good_step()
    bench.recorder.close()
    assert bench.recorder._settled.reduction.kinds == ("mean", "pooled")
