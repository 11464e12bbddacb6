"""The result: labelled, saved and opened, checked."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from cases import MODELS, OPTIMIZERS
from training import train
from zarr.storage import LocalStore, MemoryStore

import attrib
from attrib import errors


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> attrib.Result:
    return train(tmp_path_factory.mktemp("result") / "run", OPTIMIZERS["adamw"], steps=5).attribute()


def test_promised_names_have_the_promised_dimensions(result: attrib.Result) -> None:
    assert result.initial.dims == result.final.dims == result.residual.dims == ("query",)
    assert result.by("example").dims == ("query", "example")
    assert result.by("step", "group").dims == ("query", "step", "group")
    assert result.by("group", "step").dims == ("query", "group", "step")
    assert result.by().dims == ("query",)
    assert result.timeline().dims == ("query", "update_step", "group")
    assert result.decay.dims[0] == result.inherited.dims[0] == "query"
    assert isinstance(result.dataset, xr.Dataset)


def test_the_ledger_adds_up_term_by_term(result: attrib.Result) -> None:
    total = result.initial + result.by("example").sum("example") + result.decay.sum(["step", "group"])
    total = total + result.inherited.sum("group") + result.residual
    np.testing.assert_allclose(total, result.final, rtol=1e-14)
    ledger = result.check()
    text = str(ledger)
    for word in ("initial", "examples", "decay", "inherited", "residual", "final", "batch identity", "step identity"):
        assert word in text
    assert set(ledger.identities) == {"batch", "step", "measurement", "split", "limit"}


def test_a_sign_is_positive_where_the_example_raised_the_measurement() -> None:
    """One example, one step of plain gradient descent: its own log-probability rises."""
    store = MemoryStore()
    model = torch.nn.Linear(2, 3).double()
    x, y = torch.randn(1, 2).double(), torch.tensor([1])
    with attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, MODELS["mlp"].loss, store) as recorder:
        MODELS["mlp"].loss(model, x, y).sum().backward()
        recorder.step([7], x, y)
    result = attrib.attribute(attrib.open_run(store), model, attrib.measure.log_prob(x, y), loss=MODELS["mlp"].loss)
    assert result.by("example").sel(example=7).item() > 0
    assert (result.final - result.initial).item() > 0


def test_top_holds_the_largest_and_the_smallest(result: attrib.Result) -> None:
    table = result.top(2)
    assert list(table.columns) == ["query", "example", "contribution"]
    for q in (0, 1):
        values = np.sort(result.by("example").values[q])
        got = table[table["query"] == q]["contribution"].to_numpy()
        np.testing.assert_array_equal(got, [values[-1], values[-2], values[1], values[0]])
    assert len(result.top(1000)) == 2 * result.dataset.sizes["example"]
    assert isinstance(table, pd.DataFrame)


def test_saved_result_is_the_same_result(result: attrib.Result, tmp_path: Path) -> None:
    result.save(tmp_path / "result.zarr")
    again = attrib.open_result(tmp_path / "result.zarr")
    xr.testing.assert_identical(again.dataset.load(), result.dataset)
    again.check()
    assert repr(again) == repr(result)
    with pytest.raises(errors.StoreExistsError, match="overwrite=True"):
        result.save(tmp_path / "result.zarr")
    result.save(tmp_path / "result.zarr", overwrite=True)


def test_saving_over_itself_keeps_it(result: attrib.Result, tmp_path: Path) -> None:
    """What is opened lazily is read while it is written."""
    path = tmp_path / "result.zarr"
    result.save(path)
    again = attrib.open_result(path)
    again.save(path, overwrite=True)
    xr.testing.assert_identical(attrib.open_result(path).dataset.load(), result.dataset)
    assert [p.name for p in tmp_path.iterdir()] == ["result.zarr"]
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="nothing can be written"):
        result.save(tmp_path / "file" / "result.zarr")


def test_number_that_is_not_finite_is_not_summed_away(result: attrib.Result) -> None:
    dataset = result.dataset.copy(deep=True)
    dataset["contribution_step_example_group"][0, 2, 3, 1] = np.nan
    broken = attrib.Result(dataset)
    assert np.isnan(broken.by()[0])
    assert np.isnan(broken.by("example")[0, 3])
    assert "nan" in str(broken.ledger())


def test_names_of_queries_come_from_the_measurement_alone(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    x, y = (d[:3] for d in trained.data)
    named = attrib.measure.log_prob(x, y, ["a", "b", "c"])
    assert trained.attribute(named).names == ["a", "b", "c"]
    assert trained.attribute(named.select([2, 0])).names == ["c", "a"]

    def classes(model: torch.nn.Module) -> torch.Tensor:
        return named(model)

    classes.names = ["airplane", "cat"]  # type: ignore[attr-defined]
    assert trained.attribute(classes).names == ["0", "1", "2"]
    with pytest.raises(errors.MeasurementError, match="got 2, expected 3"):
        attrib.measure.margin(x, y, ["a", "b"])


@pytest.mark.parametrize("wrap", [str, LocalStore])
@pytest.mark.parametrize("overwrite", [False, True])
def test_saving_never_deletes_what_is_no_result(
    wrap: Any, overwrite: bool, result: attrib.Result, tmp_path: Path
) -> None:
    train(tmp_path / "run", OPTIMIZERS["sgd"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    for place in ("run", "notes"):
        if place == "run" or wrap is str:
            with pytest.raises(errors.StoreExistsError, match=r"exists already|something other"):
                result.save(wrap(str(tmp_path / place)), overwrite=overwrite)
    assert attrib.open_run(tmp_path / "run").steps == 6
    assert (tmp_path / "notes" / "thesis.tex").read_text() == "years of work"


def test_opening_what_is_no_result_says_so(tmp_path: Path) -> None:
    with pytest.raises(errors.StoreError, match="no result"):
        attrib.open_result(tmp_path / "nothing")
    train(tmp_path / "run", OPTIMIZERS["sgd"])
    with pytest.raises(errors.StoreError, match="open_run"):
        attrib.open_result(tmp_path / "run")


def test_incomplete_result_names_the_number_and_the_query(result: attrib.Result) -> None:
    dataset = result.dataset.copy(deep=True)
    dataset["residual"][1] = 0.5
    dataset["step_identity"][3] = 0.25
    with pytest.raises(errors.CompletenessError, match=r"at query 1\. The step identity .* 0\.25 at step 3"):
        attrib.Result(dataset).check()


def test_residual_that_is_not_a_number_is_no_pass(result: attrib.Result) -> None:
    dataset = result.dataset.copy(deep=True)
    dataset["residual"][0] = np.nan
    with pytest.raises(errors.CompletenessError):
        attrib.Result(dataset).check()


def test_facts_about_the_run_travel_with_the_result(result: attrib.Result) -> None:
    facts = result.dataset.attrs
    assert facts["measurement"] == "log_prob"
    assert facts["units"] == "nats"
    assert facts["optimizer"] == "AdamW"
    assert "not a counterfactual" in facts["meaning"]


MEASUREMENTS = {
    "log_prob": lambda z, y: torch.log_softmax(z, -1)[torch.arange(len(y)), y],
    "loss": lambda z, y: torch.nn.functional.cross_entropy(z, y, reduction="none"),
    "logit": lambda z, y: z[torch.arange(len(y)), y],
    "margin": lambda z, y: torch.stack(
        [r[k] - torch.cat([r[:k], r[k + 1 :]]).max() for r, k in zip(z, y, strict=True)]
    ),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_are_what_they_say(name: str) -> None:
    model = torch.nn.Linear(4, 5).double()
    x, y = torch.randn(6, 4).double(), torch.randint(0, 5, (6,))
    measurement = getattr(attrib.measure, name)(x, y)
    torch.testing.assert_close(measurement(model), MEASUREMENTS[name](model(x), y))


def test_token_log_probabilities_are_summed_and_ignored_targets_left_out() -> None:
    logits = torch.randn(2, 3, 5).double()
    y = torch.tensor([[1, 2, 3], [0, -100, 4]])
    model = torch.nn.Identity()
    expected = torch.log_softmax(logits, -1)
    want = [expected[0, 0, 1] + expected[0, 1, 2] + expected[0, 2, 3], expected[1, 0, 0] + expected[1, 2, 4]]
    torch.testing.assert_close(attrib.measure.log_prob(logits, y)(model), torch.stack(want))


@pytest.mark.parametrize(
    ("x", "y"), [(torch.zeros(3), torch.tensor(1)), (torch.zeros(3, 2), torch.zeros(2)), ("x", "y")]
)
def test_bad_measurement_batches_are_refused(x: object, y: object) -> None:
    with pytest.raises(errors.MeasurementError):
        attrib.measure.log_prob(x, y)  # type: ignore[arg-type]


PARTS = ("initial", "final", "residual", "decay", "inherited", "timeline", "curve", "contribution_step_example_group")


@pytest.mark.parametrize("name", PARTS)
def test_part_that_was_changed_is_found_by_adding_up_again(name: str, result: attrib.Result) -> None:
    """By far less than the residual may be: what is compared are sums of the same numbers."""
    result.check(1e-10)
    for value, text in ((1e-12, "do not agree"), (np.nan, "not finite"), (np.inf, "not finite")):
        dataset = result.dataset.copy(deep=True)
        where = (0, *(size // 2 for size in dataset[name].shape[1:]))
        if name == "curve":
            where = (0, 0)
        scale = float(dataset["gross"][0]) * (1e3 if name == "timeline" else 1.0)  # is compared to the tolerance
        dataset[name].values[where] += value * scale * (1e3 if np.isfinite(value) else 1.0)
        with pytest.raises(errors.CompletenessError, match=f"{text}|add up"):
            attrib.Result(dataset).check(1e-10)


def test_a_residual_that_is_small_beside_the_measurement_is_small_for_the_timeline_too(tmp_path: Path) -> None:
    """What a short window changes may be little beside the measurement, whose rounding is in all."""
    trained = train(tmp_path / "run", lambda p: torch.optim.SGD(p, lr=1e-5))
    dataset = trained.attribute(steps=slice(0, 1)).dataset.copy(deep=True)
    off = 0.5e-6 * np.abs(dataset["initial"].values)
    assert (off > 1e-6 * dataset["gross"].values).all()
    for name, at in (("final", ...), ("residual", ...), ("curve", (..., -1)), ("timeline", (..., 0, 0))):
        dataset[name].values[at] += off
    attrib.Result(dataset).check(1e-6)
    with pytest.raises(errors.CompletenessError, match="do not add up"):
        attrib.Result(dataset).check(1e-7)


def test_marginals_that_do_not_agree_are_found(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"])
    kept = trained.attribute(keep=[("step", "example"), ("step", "group")])
    kept.check(1e-10)
    for name in ("contribution_step_example", "contribution_step_group"):
        dataset = kept.dataset.copy(deep=True)
        dataset[name].values[1, -1] *= 1 + 1e-9
        with pytest.raises(errors.CompletenessError, match=rf"do not agree.*`{name}`.*query 1"):
            attrib.Result(dataset).check(1e-6)


def test_result_that_is_replaced_while_it_is_open_is_not_mixed_with_the_new_one(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"])
    trained.attribute().save(tmp_path / "res")
    lazy = attrib.open_result(tmp_path / "res")
    trained.attribute(steps=slice(1, 5)).save(tmp_path / "res", overwrite=True)
    with pytest.raises(errors.StoreError, match="res"):
        lazy.check()
    attrib.open_result(tmp_path / "res").check(1e-10)
