"""attribute(): windows, blocks, groups, kept axes, the two clocks; bad input."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from cases import MODELS, OPTIMIZERS, Cnn, Mlp, crossed
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training import Trained, train

import attrib
from attrib import errors
from attrib.marginals import AXES, Slots, choose
from attrib.tally import Tally, total


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("engine")
    return train(folder / "run", OPTIMIZERS["adamw amsgrad"], steps=11, examples=14, block=3)


@pytest.fixture(scope="module")
def result(trained: Trained) -> attrib.Result:
    """Of the whole run, as it comes without options."""
    return trained.attribute()


@pytest.mark.parametrize("window", [(0, 11), (0, 3), (3, 6), (4, 5), (2, 11), (5, 9)])
def test_every_window_is_complete_by_itself(window: tuple[int, int], trained: Trained) -> None:
    a, b = window
    measurement = trained.measurement()
    result = trained.attribute(measurement, steps=slice(a, b))
    result.check(1e-10)
    for state, value in ((a, result.initial), (b, result.final)):
        model = Mlp().double()
        trained.run.load(model, state)
        np.testing.assert_allclose(value, measurement(model).detach(), rtol=1e-12)
    assert list(result.dataset["step"].values) == list(range(a, b))
    if a:
        assert float(abs(result.inherited.sum("group")).min()) > 0


def test_window_of_the_last_steps_agrees_with_the_whole_run(trained: Trained, result: attrib.Result) -> None:
    """The sensitivity of the end does not depend on where the window starts."""
    whole = result.by("step", "example").sel(step=slice(7, 10))
    part = trained.attribute(steps=slice(7, None)).by("step", "example")
    np.testing.assert_allclose(part, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("block", [1, 2, 5, 64])
def test_blocks_of_steps_change_nothing(block: int, result: attrib.Result, tmp_path: Path) -> None:
    other = train(tmp_path / "run", OPTIMIZERS["adamw amsgrad"], steps=11, examples=14, block=block)
    a, b = (r.by("step", "example", "group").values for r in (result, other.attribute()))
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_blocks_of_queries_change_nothing(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    measurement = trained.measurement(7)
    whole = trained.attribute(measurement)
    plain = trained.attribute(lambda m: measurement(m))
    monkeypatch.setattr("attrib.path.measured.GRADIENT_BYTES", 8 * 2 * trained.run.layout.size)
    for m, expected in ((measurement, whole), (lambda m: measurement(m), plain)):
        np.testing.assert_allclose(
            trained.attribute(m).by("step", "example"), expected.by("step", "example"), rtol=1e-12, atol=1e-14
        )
    for q in (0, 6):
        x, y = (t[q : q + 1] for t in measurement.batch)
        single = trained.attribute(attrib.measure.log_prob(x, y))
        np.testing.assert_allclose(single.by("example")[0], whole.by("example")[q], rtol=1e-10, atol=1e-13)


def test_both_clocks_sum_to_the_same_total(result: attrib.Result) -> None:
    change = result.final - result.initial
    np.testing.assert_allclose(result.timeline().sum(["update_step", "group"]), change, rtol=1e-12)
    np.testing.assert_allclose(result.curve.diff("state"), result.timeline().sum("group"), rtol=1e-9, atol=1e-13)
    by_step = result.by("step").values + result.decay.sum("group").values
    assert np.abs(by_step - result.timeline().sum("group").values).max() > 1e-4  # momentum: they are two clocks


def test_groups_are_sums_of_tensors(trained: Trained, result: attrib.Result) -> None:
    groups = {"ends": ["embedding.*", "output.*"], "middle": "hidden.weight"}
    grouped = trained.attribute(groups=groups)
    assert list(grouped.dataset["group"].values) == ["ends", "middle", "other"]
    for term in (lambda r: r.by("step", "example", "group"), lambda r: r.decay, lambda r: r.timeline()):
        fine, coarse = term(result), term(grouped)
        ends = fine.sel(group=["embedding.weight", "output.weight", "output.bias"]).sum("group")
        np.testing.assert_allclose(coarse.sel(group="ends"), ends, atol=1e-14)
        np.testing.assert_allclose(coarse.sel(group="other"), fine.sel(group="hidden.bias"), atol=1e-14)
    grouped.check(1e-10)


def test_a_group_of_each_tensor_has_its_own_whatever_their_order(trained: Trained, result: attrib.Result) -> None:
    names = [*result.dataset["group"].values]
    turned = trained.attribute(groups={f"only {name}": [name] for name in reversed(names)})
    for term in (lambda r: r.by("step", "example", "group"), lambda r: r.decay, lambda r: r.timeline()):
        for name in names:
            np.testing.assert_allclose(
                term(turned).sel(group=f"only {name}"), term(result).sel(group=name), rtol=1e-12, atol=1e-15
            )


@pytest.mark.parametrize(
    ("groups", "match"),
    [({"a": ["hiden.*"]}, "names no parameter.*'hiden"), ({"a": ["*"], "b": ["hidden.bias"]}, "two groups")],
)
def test_bad_groups_are_refused(groups: dict[str, list[str]], match: str, trained: Trained) -> None:
    with pytest.raises(ValueError, match=match):
        trained.attribute(groups=groups)


def test_kept_axes_are_sums_of_the_whole(trained: Trained, result: attrib.Result) -> None:
    for keep in (("example",), [("step",), ("group", "example")], [()]):
        part = trained.attribute(keep=keep)
        for kept in part.kept:
            np.testing.assert_allclose(part.by(*kept), result.by(*kept), rtol=1e-10, atol=1e-13)
    with pytest.raises(errors.KeptAxesError, match=r"keep=\('step', 'example'\)"):
        trained.attribute(keep=("example",)).by("example", "step")
    with pytest.raises(errors.KeptAxesError, match="unknown axes"):
        trained.attribute(keep=("examples",))


@given(
    queries=st.integers(1, 3), steps=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 99),
    kept=st.lists(st.sets(st.sampled_from(AXES)), min_size=1, max_size=3),
)  # fmt: skip
def test_marginals_are_sums_of_the_cube(queries: int, steps: int, groups: int, seed: int, kept: list[set[str]]) -> None:
    random = np.random.default_rng(seed)
    sizes = {"step": steps, "example": 5, "group": groups}
    sets = choose([tuple(k) for k in kept], queries, sizes)
    pieces = []
    cube = np.zeros((queries, steps, 5, groups))
    for step in reversed(range(steps)):
        examples = random.integers(0, 5, size=7)  # an id may come twice
        values = random.normal(size=(queries, 7, groups))
        for slot, e in enumerate(examples):
            cube[:, step, e] += values[:, slot]
        slots = Slots(examples)
        pieces.append(Tally(range(step, step + 1), slots.examples, slots.sums(sets, values)))
    whole = total(pieces, range(steps), np.arange(sizes["example"]))
    assert whole is not None
    for axes, array in whole.marginals.items():
        over = tuple(n + 1 for n, a in enumerate(AXES) if a not in axes)
        np.testing.assert_allclose(array, cube.sum(over), atol=1e-12)


def test_default_keeps_what_fits() -> None:
    small = {"step": 10, "example": 10, "group": 10}
    assert choose(None, 1, small) == [AXES]
    large = {"step": 2000, "example": 4000, "group": 6}
    assert choose(None, 1, large) == [("example", "group"), ("step", "example"), ("step", "group")]
    huge = {"step": 20000, "example": 10**6, "group": 160}
    assert choose(None, 1, huge) == [("example",), ("step", "group")]


def test_cube_on_disk_is_the_cube_in_memory(trained: Trained, tmp_path: Path) -> None:
    result = trained.attribute(cube=str(tmp_path / "cube"), keep=("step", "example", "group"))
    cube = xr.open_zarr(tmp_path / "cube", chunks=None, consolidated=False)
    assert cube["contribution"].dims == ("query", "step", "slot", "group")
    whole = result.by("step", "example", "group")
    for step in range(trained.run.steps):
        index = trained.run.index(step)
        got = cube["contribution"].values[:, step, : len(index)]
        np.testing.assert_array_equal(got, whole.sel(step=step, example=index))
    assert cube.attrs["attrib"]["complete"]
    with pytest.raises(errors.StoreExistsError):
        trained.attribute(cube=str(tmp_path / "cube"))


def test_model_generator_and_gradients_come_back_as_they_were(trained: Trained) -> None:
    model = trained.model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    trained.attribute()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for n, p in model.named_parameters():
        assert (p.grad is None) == (grads[n] is None)
        assert p.grad is None or torch.equal(p.grad, grads[n])


def test_model_comes_back_in_its_mode_after_an_error(trained: Trained) -> None:
    model = Mlp().double().eval()

    def broken(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        attrib.attribute(trained.run, model, trained.measurement(), loss=broken, progress=False)
    assert not any(m.training for m in model.modules())


def test_loss_is_asked_for_under_replay(trained: Trained) -> None:
    with pytest.raises(errors.LossError, match="loss=None"):
        attrib.attribute(trained.run, trained.model, trained.measurement(), progress=False)


def test_another_loss_is_found_out(trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    def other(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return trained.case.loss(m, x, y) ** 2

    with caplog.at_level(logging.WARNING, logger="attrib"):
        result = trained.attribute(loss=other)
    assert sum("not the one that was recorded" in message for message in caplog.messages) == 1
    with pytest.raises(errors.CompletenessError, match="batch identity is furthest off"):
        result.check()


def test_a_loss_that_is_recorded_times_a_number_is_the_same_account(trained: Trained, result: attrib.Result) -> None:
    """What was recorded of the scale is assumed at steps that are not checked: p.grad says what it is."""
    scaled = trained.attribute(loss=lambda m, x, y: 2 * trained.case.loss(m, x, y))
    scaled.check()
    np.testing.assert_allclose(scaled.by("example"), result.by("example"), rtol=1e-9)


def test_arguments_of_another_kind_are_refused_in_words(trained: Trained) -> None:
    for options, match in (
        ({"steps": 5}, "slice"),
        ({"steps": (0, 5)}, "slice"),
        ({"path": attrib.Secant}, r"Secant\(\)"),
    ):
        with pytest.raises(TypeError, match=match):
            trained.attribute(**options)
    with pytest.raises(TypeError, match="open_run"):
        attrib.attribute("run.zarr", trained.model, trained.measurement())  # type: ignore[arg-type]
    with pytest.raises(errors.MeasurementError, match="index 99 is out of bounds"):
        trained.attribute(attrib.measure.log_prob(trained.data[0][:1], torch.tensor([99])))
    np.testing.assert_allclose(trained.attribute(keep="step").by("step"), trained.attribute().by("step"), atol=1e-12)


def test_obvious_callables_over_float32_inputs_work(tmp_path: Path) -> None:
    recorded = train(tmp_path / "run", OPTIMIZERS["adamw"], "cnn", dtype=torch.float32)
    x = recorded.data[0][:2]
    result = recorded.attribute(lambda m: m(x)[:, 0])
    result.check(1e-5)
    with pytest.raises(errors.MeasurementError, match="dtype="):
        recorded.attribute(lambda m: m(x)[:, 0], dtype=torch.float64)
    exact = recorded.attribute(lambda m: m(x.to(next(m.parameters()).dtype))[:, 0])
    np.testing.assert_allclose(result.by("example"), exact.by("example"), rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """In float32, with steps that grow small."""
    return train(
        tmp_path_factory.mktemp("single") / "run", OPTIMIZERS["adamw"], dtype=torch.float32, steps=40, clip=1.0,
        scheduler=lambda r: torch.optim.lr_scheduler.CosineAnnealingLR(r, 40),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("window", "name"),
    crossed([(0, 40), (0, 5), (20, 40), (36, 40), (39, 40)], ["log_prob", "logit", "margin", "loss"]),
)
def test_every_measurement_of_a_float32_run_passes_the_default_check(
    window: tuple[int, int], name: str, single: Trained
) -> None:
    """Terms that cancel, windows in which little happens: rounding is judged by the size of what is summed."""
    x, y = (d[:10] for d in single.data)
    ledger = single.attribute(getattr(attrib.measure, name)(x, y), steps=slice(*window)).check()
    assert max(ledger.identities.values()) < 1e-3


@pytest.mark.parametrize("window", [slice(3, 3), slice(5, 2), slice(0, 12), slice(0, 6, 2), slice(20, 30)])
def test_bad_windows_are_refused(window: slice, trained: Trained) -> None:
    with pytest.raises(ValueError, match="0 <= a < b <= 11"):
        trained.attribute(steps=window)


def bigger() -> nn.Module:
    model = Mlp()
    model.hidden = nn.Linear(12, 17)
    return model


def longer() -> nn.Module:
    model = Mlp()
    model.extra = nn.Linear(1, 1)
    return model


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (bigger, r"\(17, 12\), expected \(16, 12\), at 'hidden.weight'"),
        (Cnn, "no tensor 'embedding.weight'"),
        (longer, "'extra.weight'"),
    ],
)
def test_another_model_is_named_by_its_first_tensor(build: type, match: str, trained: Trained) -> None:
    model = build().double()
    with pytest.raises(errors.ModelMismatchError, match=match):
        attrib.attribute(trained.run, model, trained.measurement(), loss=trained.case.loss)
    with pytest.raises(errors.ModelMismatchError, match=match):
        trained.run.load(model, 0)


def test_loading_into_another_type_is_refused(trained: Trained) -> None:
    with pytest.raises(errors.ModelMismatchError, match=r"float32, expected torch\.float64, at 'embedding.weight'"):
        trained.run.load(Mlp(), 0)


def test_other_buffers_are_named_and_load_mends_them(tmp_path: Path) -> None:
    recorded = train(tmp_path / "run", OPTIMIZERS["sgd"], "cnn")
    model = Cnn().double()
    with pytest.raises(errors.ModelMismatchError, match=r"'norm.running_mean'.*run.load"):
        attrib.attribute(recorded.run, model, recorded.measurement(), loss=recorded.case.loss, progress=False)
    recorded.run.load(model, 0)
    attrib.attribute(recorded.run, model, recorded.measurement(), loss=recorded.case.loss, progress=False).check(1e-10)


HELD = {  # of a run of 11 steps: the window, the state that the model holds, whether that is said
    "the last": (slice(None), 11, False),
    "another": (slice(None), 10, True),
    "the window's last": (slice(2, 6), 6, False),
    "the run's last, of a window": (slice(2, 6), 11, False),
    "the window's first": (slice(2, 6), 2, True),
}


@pytest.mark.parametrize("case", HELD)
def test_a_model_that_holds_other_values_than_those_explained_is_noted_once(
    case: str, trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    window, state, noted = HELD[case]
    model = Mlp().double()
    trained.run.load(model, state)
    expected = trained.attribute(steps=window)
    caplog.clear()
    result = attrib.attribute(
        trained.run, model, trained.measurement(), steps=window, loss=trained.case.loss, progress=False
    )
    np.testing.assert_array_equal(result.final, expected.final)  # the run's states all the same
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == noted
    assert all(r.name == "attrib" and "run.load(model, run.steps)" in r.getMessage() for r in said)
    assert all("first at 'embedding.weight': the states of the run are explained" in r.getMessage() for r in said)
    trained.run.load(model, trained.run.steps)
    caplog.clear()
    attrib.attribute(trained.run, model, trained.measurement(), steps=window, loss=trained.case.loss, progress=False)
    assert not caplog.records


def test_moves_note_the_models_values_once(trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    found = list(attrib.moves(trained.run, Mlp().double(), trained.measurement(), range(3, 6), loss=trained.case.loss))
    assert len(found) == 3
    assert sum("other parameters than the run's last state" in message for message in caplog.messages) == 1


BAD_MEASUREMENTS = {
    "scalar": (lambda m: m.output.bias.sum(), r"shape \(\)"),
    "matrix": (lambda m: m.output.weight, r"shape \(7, 16\)"),
    "number": (lambda m: 1.0, "float"),
    "infinite": (lambda m: m.output.bias / 0, "not finite"),
    "random": (lambda m: m.output.bias * torch.rand(7), "random"),
}


@pytest.mark.parametrize("kind", BAD_MEASUREMENTS)
def test_bad_measurements_are_refused(kind: str, trained: Trained) -> None:
    measurement, match = BAD_MEASUREMENTS[kind]
    with pytest.raises(errors.MeasurementError, match=match):
        trained.attribute(measurement)


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_attribution_on_a_gpu_is_that_on_the_cpu(model: str, tmp_path: Path) -> None:
    recorded = train(tmp_path / "run", OPTIMIZERS["adamw"], model)
    expected = recorded.attribute()
    result = attrib.attribute(
        recorded.run, recorded.model.cuda(), recorded.measurement(), loss=recorded.case.loss, progress=False
    )
    result.check(1e-9)
    np.testing.assert_allclose(result.by("example"), expected.by("example"), rtol=1e-8, atol=1e-10)


def test_a_coarser_compute_type_is_no_reason_to_warn(trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="attrib"):
        trained.attribute(dtype=torch.float32).check(1e-5)
    assert not caplog.messages
