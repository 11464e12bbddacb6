"""Retrainings without some examples are those of a plain loop, however they are made; scores are held against them."""

import json
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from cases import MODELS, OPTIMIZERS, few_first
from scipy import stats
from test_executor import Dying, Noisy, noisy_loss, processes
from torch import Tensor, nn
from training import Trained, train

import attrib
from attrib import errors
from attrib.counterfactual import work

SUBSETS = [[0], [3, 7], [1, 2, 4], [11, 0]]
# float64: sums in another order, each of some 20 terms, over six steps; nothing in these networks amplifies rounding
# by more than a thousand
ROUNDING = 1e-10


def by_hand(
    trained: Trained, optimizer: Callable[..., Any], without: list[int], weight: float | None, steps: int | None = None
) -> np.ndarray:
    """(Q,): the measurement after the recorded batches without some examples, in a loop that knows nothing of attrib."""
    torch.manual_seed(0)
    net = trained.case.build().double()
    inner = optimizer(list(net.parameters()))
    several = inner if isinstance(inner, list) else [inner]
    for index, x, y in trained.batches[:steps]:
        kept = torch.tensor([i not in without for i in index.tolist()])
        for each in several:
            each.zero_grad()
        if weight is None:
            trained.case.loss(net, x[kept], y[kept]).mean().backward()
        else:
            weights = torch.where(kept, 1.0, weight)
            (weights * trained.case.loss(net, x, y)).mean().backward()
        for each in several:
            each.step()
    x, y = (d[:2] for d in trained.data)
    return (-trained.case.loss(net, x, y)).detach().numpy()


def outcomes_of(trained: Trained, subsets: Any = SUBSETS, **options: Any) -> attrib.Outcomes:
    options = {"model": trained.model, "loss": trained.case.loss, "progress": False, **options}
    return attrib.retrain_subsets(trained.run, subsets, measured(trained), **options)


def measured(trained: Trained) -> Any:
    return attrib.measure.Measurement(Negative(trained.case.loss), tuple(d[:2] for d in trained.data), "negative loss")


class Negative:
    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return -self.loss(model, x, y)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("truth") / "run", OPTIMIZERS["adamw"])


# side by side torch's own optimizers see tensors of another shape: one of each way in which they differ
FEW = ("sgd groups", "adamw fused", "nadam decoupled foreach", "muon + adamw")


@pytest.mark.parametrize(("optimizer", "model"), few_first(OPTIMIZERS, MODELS, few=FEW))
def test_outcomes_are_those_of_a_plain_loop_one_at_a_time_and_side_by_side(
    optimizer: str, model: str, tmp_path: Path
) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS[optimizer], model)
    whole, known = any(rule.whole for rule in trained.run.rules), trained.run.examples.tolist()
    subsets = [[known[n % len(known)] for n in ids] for ids in SUBSETS]
    for weight in (None, 0.5):
        expected = np.stack([by_hand(trained, OPTIMIZERS[optimizer], ids, weight) for ids in subsets])
        for at_once in (1,) if whole else (1, 4):
            found = outcomes_of(trained, subsets, weight=weight, at_once=at_once)
            np.testing.assert_allclose(found.values.values, expected, rtol=ROUNDING, atol=ROUNDING)
    untouched = by_hand(trained, OPTIMIZERS[optimizer], [], None)
    np.testing.assert_allclose(found.base.values, untouched, rtol=ROUNDING, atol=ROUNDING)
    assert float(abs(found.changes).min()) > 1e3 * ROUNDING  # each of these examples matters


@pytest.mark.parametrize("reduction", ["mean", "pooled", "sum"])
def test_several_batches_a_step_side_by_side_are_as_one_at_a_time(reduction: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, (x, y) = MODELS["mlp"].build().double(), MODELS["mlp"].data(12)
    recorder = attrib.record(
        OPTIMIZERS["sgd momentum"](list(net.parameters())), net, MODELS["mlp"].loss, tmp_path / "r"
    )
    passes = [torch.tensor(p) for p in ([0, 1], [2, 3, 4], [5], [0, 6])]
    for step in range(4):
        recorder.zero_grad()
        for index in passes[step % 2 :]:
            recorder.batch(index, x[index], y[index])
            losses = MODELS["mlp"].loss(net, x[index], y[index])
            total = sum(len(p) for p in passes[step % 2 :])
            {
                "mean": losses.mean() / len(passes[step % 2 :]),
                "pooled": losses.sum() / total,
                "sum": losses.sum() / 1,
            }[reduction].backward()
        recorder.step()
    recorder.close()
    run = attrib.open_run(tmp_path / "r")
    subsets = [[0, 1], [5], [2, 6], [0, 3]]  # the first and the second empty a batch of their own
    options = {"model": net, "loss": MODELS["mlp"].loss, "progress": False}
    for weight in (None, [None, 0.0, 0.3, 1.5]):
        ask = partial(attrib.retrain_subsets, run, subsets, attrib.measure.log_prob(x, y), weight=weight, **options)
        alone, together = ask(at_once=1).values.values, ask(at_once=4).values.values
        np.testing.assert_allclose(together, alone, rtol=ROUNDING, atol=ROUNDING)
    assert np.ptp(alone, 0).min() > 1e3 * ROUNDING


def test_a_run_that_began_with_momentum_goes_on_with_it_side_by_side(tmp_path: Path) -> None:
    first = train(tmp_path / "first", OPTIMIZERS["adam amsgrad"])
    options = {"model": first.model, "loss": first.case.loss, "progress": False}
    later = attrib.replay(first.run, 3, store=tmp_path / "later", **options)
    ids = [later.examples[[n]].tolist() for n in range(3)]
    ask = partial(attrib.retrain_subsets, later, ids, measured(first), **options)
    np.testing.assert_allclose(ask(at_once=3).values, ask(at_once=1).values, rtol=ROUNDING, atol=ROUNDING)


def test_retrainings_begin_where_their_first_example_comes(trained: Trained, monkeypatch: Any) -> None:
    starts = []
    own = work.retrain
    monkeypatch.setattr(
        work, "retrain", lambda run, start, *rest, **k: starts.append(start) or own(run, start, *rest, **k)
    )
    outcomes_of(trained, at_once=1)
    first = [
        min(n for n, (index, _, _) in enumerate(trained.batches) if set(ids) & set(index.tolist())) for ids in SUBSETS
    ]
    assert starts == [0, *first]  # the first is the check
    assert len(set(first)) > 1


def test_how_many_side_by_side_is_chosen_by_size(trained: Trained, monkeypatch: Any) -> None:
    seen = []
    own = work.Retraining.outcomes

    def noted(self: Any, changes: Any, together: bool) -> np.ndarray:
        seen.append((len(changes), together))
        return own(self, changes, together)

    monkeypatch.setattr(work.Retraining, "outcomes", noted)
    subsets = [[n % 12] for n in range(70)]
    outcomes_of(trained, subsets)
    assert seen == [(work.MOST, True), (70 - work.MOST, True)]
    seen.clear()
    monkeypatch.setattr(work, "TOGETHER_BYTES", 1)
    outcomes_of(trained, subsets[:3])
    assert seen == [(1, False)] * 3


def test_where_the_loss_draws_numbers_or_examples_see_each_other_it_is_one_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))

    def coupled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return noisy_loss(model, x - x.mean(0) * model.hidden.bias[:1].square(), y)

    for loss, training, word in ((noisy_loss, True, "draws random numbers"), (coupled, False, "depend on each other")):
        net = Noisy().double().train(training)
        store = tmp_path / str(training)
        recorder = attrib.record(torch.optim.SGD(net.parameters(), lr=0.5), net, loss, store)
        for step in range(3):
            index = torch.arange(step, step + 6)
            recorder.zero_grad()
            loss(net, x[index], y[index]).mean().backward()
            recorder.step(index, x[index], y[index])
        recorder.close()
        run, measurement = attrib.open_run(store), attrib.measure.log_prob(x, y)
        options = {"model": net.eval(), "loss": loss, "progress": False}
        with pytest.raises(errors.ReplayError, match=word):
            attrib.retrain_subsets(run, [[0]], measurement, at_once=2, **options)
        found = attrib.retrain_subsets(run, [[0], [4, 5]], measurement, weight=[0.0, None], **options)
        change = attrib.intervention.Drop([4, 5])
        *_, (_, again) = attrib.retrain(run, 0, change, model=net, loss=loss)
        np.testing.assert_array_equal(found.values[1], measurement(again.eval()).detach())


def test_clipping_and_penalties_are_those_of_the_loop(tmp_path: Path) -> None:
    def penalty(model: nn.Module) -> Tensor:
        return 0.1 * model.output.weight.square().sum()

    def backward(losses: Tensor, model: nn.Module) -> None:
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    clipped = train(tmp_path / "clipped", OPTIMIZERS["sgd"], clip=0.1)
    with pytest.raises(errors.ReplayError, match="more than take the mean"):
        outcomes_of(clipped)
    found = outcomes_of(clipped, backward=backward)
    *_, (_, again) = attrib.retrain(
        clipped.run, 0, attrib.intervention.Drop([3, 7]), model=clipped.model, loss=clipped.case.loss, backward=backward
    )
    np.testing.assert_array_equal(found.values[1], measured(clipped)(again).detach())

    def reduction(losses: Tensor) -> Tensor:
        return losses.mean() + penalty(nets[0])

    nets: list[nn.Module] = []
    case = MODELS["mlp"]._replace(build=lambda: nets.append(MODELS["mlp"].build().double()) or nets[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "penalised", case)
        penalised = train(tmp_path / "penalised", OPTIMIZERS["sgd"], "penalised", reduction=reduction, penalty=penalty)
    with pytest.raises(errors.ReplayError, match="pass it as penalty="):
        outcomes_of(penalised)
    assert outcomes_of(penalised, penalty=penalty).missing == 0


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("kind", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_workers_give_what_one_process_does(trained: Trained, kind: str, at_once: int) -> None:
    def pool() -> Any:
        return ThreadPoolExecutor(2) if kind == "threads" else processes(2)

    expected = outcomes_of(trained, at_once=at_once)
    with pool() as executor:
        found = outcomes_of(trained, at_once=at_once, executor=executor)
    np.testing.assert_allclose(found.values, expected.values, rtol=ROUNDING, atol=ROUNDING)


def test_a_call_that_was_cut_short_goes_on_where_it_was(trained: Trained, tmp_path: Path, monkeypatch: Any) -> None:
    store = tmp_path / "outcomes"
    with pytest.raises(errors.WorkerError) as died:
        outcomes_of(trained, at_once=1, store=store, executor=Dying(2))
    assert died.value.result.missing == 2
    partly = attrib.open_outcomes(store)
    assert partly.missing == 2
    assert partly.dataset["subset"].values.tolist() == [0, 1]
    with store.open("a") as file:
        file.write('0123456789abcdef {"subset": 2, "val')  # what a kill leaves
    trainings = []
    own = work.Retraining.outcomes
    monkeypatch.setattr(work.Retraining, "outcomes", lambda self, c, t: trainings.append(len(c)) or own(self, c, t))
    found = outcomes_of(trained, at_once=1, store=store)
    assert trainings == [1, 1]
    xr.testing.assert_identical(found.dataset, outcomes_of(trained, at_once=1).dataset)
    xr.testing.assert_identical(attrib.open_outcomes(store).dataset, found.dataset)


def test_ctrl_c_ends_with_what_is_done(trained: Trained, monkeypatch: Any) -> None:
    own = work.Retraining.outcomes
    monkeypatch.setattr(
        work.Retraining, "outcomes", lambda *a: signal.raise_signal(signal.SIGINT) or own(*a)
    )  # during the first
    with pytest.raises(errors.Interrupted) as pressed:
        outcomes_of(trained, at_once=1)
    assert pressed.value.result.missing == 3


def test_outcomes_are_saved_and_opened(trained: Trained, tmp_path: Path) -> None:
    called = train(tmp_path / "run", OPTIMIZERS["sgd"], called=lambda index: [f"doc {i}" for i in index.tolist()])
    found = outcomes_of(called, [["doc 3", "doc 1"], ["doc 0"]], weight=[None, 0.5])
    found.save(tmp_path / "saved")
    again = attrib.open_outcomes(tmp_path / "saved")
    xr.testing.assert_identical(again.dataset, found.dataset)
    assert [set(s.tolist()) for s in again.subsets] == [{"doc 3", "doc 1"}, {"doc 0"}]
    with pytest.raises(errors.StoreExistsError, match="overwrite=True"):
        found.save(tmp_path / "saved")
    found.save(tmp_path / "saved", overwrite=True)
    (tmp_path / "else").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(errors.StoreExistsError, match="not attrib's"):
            found.save(tmp_path / "else", overwrite=overwrite)
    assert (tmp_path / "else").read_text() == "mine"


def test_a_file_of_other_outcomes_is_refused_and_left_alone(trained: Trained, tmp_path: Path) -> None:
    store, other = tmp_path / "outcomes", train(tmp_path / "other", OPTIMIZERS["sgd"])
    outcomes_of(trained, store=store)
    before = store.read_bytes()
    x, y = (d[:2] for d in trained.data)
    asked: list[tuple[str, Callable[[], Any]]] = [
        ("another run", lambda: outcomes_of(other, store=store)),
        ("other subsets", lambda: outcomes_of(trained, [*SUBSETS[:3], [11]], store=store)),
        ("other weights", lambda: outcomes_of(trained, weight=0.0, store=store)),
        ("another type", lambda: outcomes_of(trained, dtype=torch.float32, store=store)),
        (
            "another measurement",
            lambda: attrib.retrain_subsets(
                trained.run,
                SUBSETS,
                attrib.measure.margin(x, y),
                model=trained.model,
                loss=trained.case.loss,
                store=store,
            ),
        ),
    ]
    for words, ask in asked:
        with pytest.raises(errors.StoreExistsError, match=words):
            ask()
    assert store.read_bytes() == before
    store.write_bytes(before.replace(b'"subset": 0', b'"subset": 1'))
    with pytest.raises(errors.StoreError, match=r"damaged.*line 1"):
        attrib.open_outcomes(store)
    with pytest.raises(errors.StoreError, match="no outcomes"):
        attrib.open_outcomes(tmp_path / "nowhere")


def test_what_cannot_be_trained_is_refused_before_anything_is(
    trained: Trained, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(work.Retraining, "outcomes", None)  # nothing is trained
    batch, locked = trained.batches[2][0].tolist(), Locked(trained.case.loss)
    wrong: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (errors.ReplayError, "got \\[99\\].*subset 1", lambda: outcomes_of(trained, [[0], [99]])),
        (errors.ReplayError, "none at all.*subset 0", lambda: outcomes_of(trained, [[]])),
        (errors.ReplayError, "no subsets", lambda: outcomes_of(trained, [])),
        (errors.ReplayError, "is no list", lambda: outcomes_of(trained, [3])),
        (errors.ReplayError, "all dropped.*step 2.*subset 1", lambda: outcomes_of(trained, [[0], batch])),
        (errors.ReplayError, "weights do not fit", lambda: outcomes_of(trained, weight=[0.0])),
        (errors.ReplayError, "a weight is none", lambda: outcomes_of(trained, weight=float("nan"))),
        (errors.ReplayError, "gradient that is off", lambda: outcomes_of(trained, loss=squared)),
        (errors.ModelMismatchError, "not the recorded one", lambda: outcomes_of(trained, model=nn.Linear(2, 2))),
        (ValueError, "at_once", lambda: outcomes_of(trained, at_once=0)),
        (TypeError, "executor", lambda: outcomes_of(trained, executor=ThreadPoolExecutor)),
        (errors.WorkerError, "cannot be sent", lambda: outcomes_of(trained, executor=Dying(0), loss=locked)),
        (errors.StoreError, "no outcomes", lambda: outcomes_of(trained, store=tmp_path)),
    ]
    for error, words, ask in wrong:
        with pytest.raises(error, match=f"(?s){words}"):
            ask()
    with pytest.raises(errors.MeasurementError):
        attrib.retrain_subsets(trained.run, SUBSETS, lambda m: "a", model=trained.model, loss=trained.case.loss)
    with pytest.raises(TypeError, match="open_run"):
        attrib.retrain_subsets("run", SUBSETS, lambda m: 0, model=trained.model, loss=trained.case.loss)


def squared(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none").square()


class Locked:
    """A loss that does not pickle."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss, self.lock = loss, threading.Lock()

    def __call__(self, *arguments: Any) -> Tensor:
        return self.loss(*arguments)


# scores


def table(seed: int = 0, queries: int = 3, examples: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((queries, examples))


def drawn(count: int = 12, size: int = 5, examples: int = 20) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.choice(examples, size, replace=False).tolist() for _ in range(count)]


def test_lds_is_spearmans_correlation_with_what_leaving_out_took_away() -> None:
    scores, subsets = table(), drawn()
    outcomes = np.random.default_rng(2).standard_normal((12, 3)).round(1)  # with ties
    found = attrib.lds(scores, subsets, outcomes)
    for q in range(3):
        predicted = [-sum(scores[q, i] for i in ids) for ids in subsets]
        expected = stats.spearmanr(predicted, outcomes[:, q]).statistic
        assert float(found["lds"][q]) == pytest.approx(expected, abs=1e-14)  # sums of 12 small numbers
        assert found["low"][q] <= found["lds"][q] <= found["high"][q]
    assert float(found["mean"]) == pytest.approx(found["lds"].values.mean(), abs=1e-14)


def test_scores_that_add_up_to_the_outcomes_have_an_lds_of_one_and_their_negatives_of_minus_one() -> None:
    scores, subsets = table(), drawn()
    outcomes = np.array([[5.0 - sum(row[i] for i in ids) for row in scores] for ids in subsets])
    for sign in (1.0, -1.0):
        found = attrib.lds(sign * scores, subsets, outcomes)
        for name in ("lds", "low", "high", "mean", "mean_low", "mean_high"):
            np.testing.assert_allclose(found[name], sign, atol=1e-12)


def test_the_interval_holds_what_the_bootstrap_of_scipy_does() -> None:
    scores, subsets = table(), drawn(40)
    outcomes = np.array([[-sum(row[i] for i in ids) for row in scores] for ids in subsets])
    outcomes += 3 * np.random.default_rng(3).standard_normal(outcomes.shape)
    found = attrib.lds(scores, subsets, outcomes, resamples=4000)
    predicted = [-sum(scores[0, i] for i in ids) for ids in subsets]
    interval = stats.bootstrap(
        (predicted, outcomes[:, 0]),
        lambda a, b: stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        random_state=np.random.default_rng(4),
    ).confidence_interval
    # quantiles of 2000 and 4000 draws: an error of about sqrt(.025 / 2000) / density, a few hundredths at most
    assert float(found["low"][0]) == pytest.approx(interval.low, abs=0.05)
    assert float(found["high"][0]) == pytest.approx(interval.high, abs=0.05)


def test_scores_come_as_arrays_labelled_arrays_and_results(trained: Trained) -> None:
    outcomes = outcomes_of(trained)
    result = trained.attribute(measured(trained))
    expected = attrib.lds(result, SUBSETS, outcomes)
    labelled = result.by("example")
    shuffled = labelled.isel(example=np.random.default_rng(0).permutation(labelled.sizes["example"]))
    for scores in (labelled, shuffled.transpose("example", "query"), labelled.values):
        np.testing.assert_allclose(attrib.lds(scores, None, outcomes)["lds"], expected["lds"])
    by_hand = [[-labelled.sel(example=ids, query=q).sum() for q in range(2)] for ids in SUBSETS]
    predicted = np.array(by_hand)
    for q in range(2):
        statistic = stats.spearmanr(predicted[:, q], outcomes.values[:, q]).statistic
        assert float(expected["lds"][q]) == pytest.approx(statistic)


def test_weights_count_in_what_scores_foretell(trained: Trained) -> None:
    weights = [0.0, 2.0, 0.5, None]
    outcomes = outcomes_of(trained, weight=weights)
    scores = table(queries=2, examples=12)
    predicted = [
        [((w or 0.0) - 1) * sum(row[i] for i in ids) for row in scores] for w, ids in zip(weights, SUBSETS, strict=True)
    ]
    found = attrib.lds(scores, SUBSETS, outcomes, examples=np.arange(12))
    for q in range(2):
        statistic = stats.spearmanr(np.array(predicted)[:, q], outcomes.values[:, q]).statistic
        assert float(found["lds"][q]) == pytest.approx(statistic)


def test_lds_refuses_what_does_not_fit() -> None:
    scores, subsets, outcomes = table(), drawn(), np.ones((12, 3))
    assert np.isnan(attrib.lds(scores, subsets, outcomes)["lds"]).all()  # all outcomes are the same
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("different queries", lambda: attrib.lds(scores[:2], subsets, outcomes)),
        ("have no score: got \\[20\\]", lambda: attrib.lds(scores, [*subsets[:11], [20]], outcomes)),
        ("nothing to correlate", lambda: attrib.lds(scores, subsets[:2], outcomes[:2])),
        ("do not fit", lambda: attrib.lds(scores, subsets[:5], outcomes)),
        ("do not fit", lambda: attrib.lds(scores, None, outcomes)),
        ("scores are not finite", lambda: attrib.lds(np.where(scores > 1, np.nan, scores), subsets, outcomes)),
        ("outcomes are not finite", lambda: attrib.lds(scores, subsets, np.full((12, 3), np.inf))),
        ("one per query and example", lambda: attrib.lds(scores[0], subsets, outcomes)),
        ("one per query and example", lambda: attrib.lds(xr.DataArray(scores), subsets, outcomes)),
    ]
    for words, ask in wrong:
        with pytest.raises(ValueError, match=words):
            ask()


def test_outcomes_of_other_subsets_are_refused(trained: Trained) -> None:
    outcomes = outcomes_of(trained)
    with pytest.raises(ValueError, match="other subsets"):
        attrib.lds(table(queries=2, examples=12), [*SUBSETS[:3], [5]], outcomes, examples=np.arange(12))


def test_mislabelled_examples_are_found_by_how_often_they_score_lower() -> None:
    scores, bad = table(queries=4).round(1), [2, 5, 11]
    found = attrib.mislabelled_auc(scores, bad)
    clean = [i for i in range(20) if i not in bad]
    for q in range(4):
        pairs = [
            1.0 if scores[q, b] < scores[q, c] else 0.5 if scores[q, b] == scores[q, c] else 0.0
            for b in bad
            for c in clean
        ]
        assert float(found[q]) == pytest.approx(np.mean(pairs), abs=1e-14)
    with pytest.raises(ValueError, match="nothing to tell apart"):
        attrib.mislabelled_auc(scores, [])


def test_leave_out_drops_each_query_its_own_highest(trained: Trained) -> None:
    scores, options = table(queries=2, examples=12), {"model": trained.model, "loss": trained.case.loss}
    curve = attrib.leave_out(
        trained.run, scores, measured(trained), (0.1, 0.25), draws=2, progress=False, examples=np.arange(12), **options
    )
    for n, size in enumerate((1, 3)):
        for q in range(2):
            top = sorted(range(12), key=lambda i: -scores[q, i])[:size]
            alone = outcomes_of(trained, [top], at_once=1)
            assert float(curve["top"][n, q]) == pytest.approx(float(alone.changes[0, q]), abs=ROUNDING)
    random = attrib.random_subsets(trained.run, 0.25, 2, seed=1)
    np.testing.assert_allclose(curve["random"][1], outcomes_of(trained, random).changes, atol=ROUNDING)
    with pytest.raises(ValueError, match="other queries"):
        attrib.leave_out(trained.run, scores[:1], measured(trained), examples=np.arange(12), **options)
    with pytest.raises(ValueError, match="shares are none"):
        attrib.leave_out(trained.run, scores, measured(trained), (5,), examples=np.arange(12), **options)


def test_random_subsets_are_drawn_without_replacement_and_again_the_same(trained: Trained) -> None:
    found = attrib.random_subsets(trained.run, 0.25, 50)
    assert all(len(set(s.tolist())) == 3 and set(s.tolist()) <= set(range(12)) for s in found)
    assert len({tuple(s) for s in found}) > 20
    assert all(map(np.array_equal, found, attrib.random_subsets(trained.run, 0.25, 50)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        attrib.random_subsets(trained.run, 1.0, 2)


def test_a_machine_that_rounds_otherwise_goes_on_with_a_file(trained: Trained, tmp_path: Path) -> None:
    store = tmp_path / "new folder" / "outcomes"
    found = outcomes_of(trained, store=store)
    header = {**found.dataset.attrs["header"], "base": (found.base.values * (1 + 1e-12)).tolist()}
    rounded = attrib.Outcomes(found.dataset.assign_attrs(header=header))
    rounded.save(store, overwrite=True)
    assert outcomes_of(trained, store=store).missing == 0
    attrib.Outcomes(found.dataset.assign_attrs(header={**header, "base": [0.0, 0.0]})).save(store, overwrite=True)
    with pytest.raises(errors.StoreExistsError, match="of another model"):
        outcomes_of(trained, store=store)


def test_a_file_of_outcomes_is_text_that_one_can_read(trained: Trained, tmp_path: Path) -> None:
    found = outcomes_of(trained, store=tmp_path / "outcomes")
    head, *lines = (json.loads(line.partition(" ")[2]) for line in (tmp_path / "outcomes").read_text().splitlines())
    assert head["run"] == trained.run.header["id"]
    assert {d["subset"]: d["value"] for d in lines} == dict(enumerate(found.values.values.tolist()))
