"""The study of counterfactuals: what it leaves out is left out, its ledgers add up, its claims follow from its numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrib
from attrib.studies.counterfactual import recipe
from attrib.studies.counterfactual.page import Tables, claims
from attrib.studies.counterfactual.recipe import CHANGES, GROUPS, SETTINGS, SUMS, Training
from attrib.studies.parts import Parts, SeedParts

TOY = SETTINGS["toy"]


def parts_in(folder: Path) -> SeedParts:
    parts = SeedParts(Parts(folder / "study", {}), 0, lambda text: None)
    parts.folder.mkdir()
    return parts


def without(t: Training, ids: Tensor, model: nn.Module) -> nn.Module:
    """Trained by hand on what is left of each batch."""
    optimizer = t.optimizer(model.parameters())
    for batch in t.batches:
        left = batch[~torch.isin(batch, ids)]
        optimizer.zero_grad()
        F.cross_entropy(model(t.x[left]), t.y[left]).backward()
        optimizer.step()
    return model


def missing(run: attrib.Run, changed: attrib.Run) -> Tensor:
    return torch.from_numpy(np.setdiff1d(run.examples, changed.examples))


def test_curve_rises_most_between_its_steepest_states() -> None:
    curve = np.array([5.0, 3.0, 4.0, 2.0, 2.5, 3.8, 1.0, 2.0, 2.9, 3.0])
    assert recipe.steepest(curve, 9) == (6, 9)
    assert recipe.steepest(curve, 2) == (6, 8)
    assert recipe.steepest(curve, 1) == (4, 5)


def test_trainings_share_batches_and_ask_for_what_they_never_saw() -> None:
    made = recipe.trainings(TOY, 0)
    assert list(made) == [*TOY.networks, SUMS]
    one, other = (made[name] for name in TOY.networks)
    assert all(torch.equal(a, b) for a, b in zip(one.batches, other.batches, strict=True))
    for training in made.values():
        assert len(training.batches) >= training.lengths[-1]
        assert not set(training.queries.tolist()) & set(torch.cat(list(training.batches)).tolist())


@pytest.mark.slow  # trains, accounts, leaves out and compares
def test_what_is_dropped_is_dropped_and_its_change_is_written_whole(tmp_path: Path) -> None:
    name, parts = TOY.networks[1], parts_in(tmp_path)  # AdamW
    full = recipe.trainings(TOY, 0)[name]
    t = full._replace(batches=full.batches[: TOY.lengths[0]])
    found = recipe.ask(TOY, parts, t, "asked")
    (row,) = found["rows"]
    run, changed = (attrib.open_run(parts.folder / f"asked{end}.zarr") for end in ("", " without"))
    ids = missing(run, changed)
    assert len(ids) == TOY.dropped
    torch.manual_seed(0)
    start = t.build().double()
    asked = attrib.measure.log_prob(t.x[t.queries], t.y[t.queries])
    run.load(start, run.steps)
    result = attrib.attribute(run, start, asked, loss=recipe.cross_entropy, progress=False)
    assert row["accounted"] == pytest.approx(-result.by("example").sel(example=ids.numpy()).sum().item())
    assert row["accounted"] == pytest.approx(-np.sort(result.by("example").values[0])[-TOY.dropped :].sum())
    values = []
    for left_out in (torch.tensor([-1]), ids):
        run.load(start, 0)
        values.append(asked(without(t, left_out, start)).item())
    assert row["measured"] == pytest.approx(values[1] - values[0], rel=1e-9)  # 3 steps in float64
    assert row["gone"] + row["reaction"] + row["residual"] == pytest.approx(row["measured"], rel=1e-12)
    assert found["causes"]["change"] == pytest.approx(row["measured"])
    assert set(found["lds"]) == {"accounting", "influence"}


@pytest.mark.slow  # a network to its spike, and again without each group
def test_spike_is_that_of_trainings_without_a_group_and_its_change_is_told_by_group(tmp_path: Path) -> None:
    parts = parts_in(tmp_path)
    found = recipe.spike(TOY, parts)
    begin, foot, peak = (found[name] for name in ("begin", "foot", "peak"))
    losses = np.array(found["losses"])  # (change, state, group)
    assert losses.shape == (len(CHANGES), len(losses[0]), len(GROUPS))
    rise = losses[0, peak - begin] - losses[0, foot - begin]
    np.testing.assert_allclose(np.sum(found["whose"], 1), rise, rtol=1e-9)
    run = attrib.open_run(parts.folder / "edge.zarr")
    everyone, groups, model = torch.arange(TOY.edge_images), [], recipe.digits.DigitsCnn().double()
    x, y = run.batch(0)
    for name in GROUPS[:3]:
        ids = missing(run, attrib.open_run(parts.folder / f"edge without {name}.zarr"))
        assert len(ids) == TOY.side
        groups.append(ids)
    others = everyone[~torch.isin(everyone, torch.cat(groups))]
    sgd = recipe.partial(torch.optim.SGD, lr=0.1)
    edge = Training(nn.Module, sgd, [everyone] * (peak - begin), x, y, everyone)
    for k, ids in enumerate(groups):
        run.load(model, begin)
        value = F.cross_entropy(without(edge, ids, model)(x[others]), y[others]).item()
        assert losses[k + 1, peak - begin, -1] == pytest.approx(value, rel=1e-9)
        change = losses[k + 1, peak - begin, -1] - losses[0, peak - begin, -1]
        assert sum(found["terms"][k]) == pytest.approx(change, abs=1e-12)
    np.testing.assert_array_equal(found["digits"], [np.bincount(y[g], minlength=10) for g in groups[:2]])


def study_of(yes: bool) -> tuple[Tables, recipe.Setting]:
    """One seed of which every claim holds, or fails."""
    s = recipe.Setting(name="s", about="a", seeds=1, lengths=(1, 2), sums=(3, 4))
    asked: list[dict[str, Any]] = []
    for network, steps in (*((name, n) for name in recipe.NETWORKS for n in (1, 2)), (SUMS, 3), (SUMS, 4)):
        near, far = (-1.0, -10.0) if yes else (-10.0, -1.0)
        row = {"accounted": near if steps == 1 else far, "predicted": near, "measured": -1.0}
        row |= {"gone": -1.0 if yes and steps == 1 else -11.0, "reaction": 10.0 if yes else 1.0}
        row["residual"] = 1e-15 if yes else 1e-3
        causes = {"change": -1.0, "residual": row["residual"], "cancellation": 1e4 if yes else 2.0}
        lds = {"accounting": 0.2 if yes else 0.9, "influence": 0.9 if yes else 0.2}
        beside = {"growth": 1.0, "held out": -1.0, "ledger": ""}
        asked.append({"network": network, "steps": steps, "rows": [row], "causes": causes, "lds": lds, **beside})
    sign = 1.0 if yes else -1.0
    calm = [1.0, 1.0, 1.0, 1.0]
    heights = [2.0, 1.1, 1.2, 1.9] if yes else [2.0, 1.9, 2.1, 1.1]  # of the others' peak, by what is left out
    losses = [[calm, [*calm[:3], height], calm] for height in heights]
    whose = np.full((4, 4), sign)
    np.fill_diagonal(whose, -sign)
    reacts = [0.0, 2.0, 0.0, 0.0] if yes else [0.0, 0.1, 0.0, 1.9]
    terms = [[1.0, *reacts[1:], 0.0], [reacts[1], 1.0, *reacts[2:], 0.0], [0.0] * 5]
    spike = {
        "begin": 5, "foot": 5, "peak": 6, "losses": losses, "terms": terms, "whose": whose.tolist(), "digits": [[1] * 10] * 2
    }  # fmt: skip
    return Tables(s, [{"seed": 0, "asked": asked, "spike": spike}]), s


def test_claims_follow_from_what_was_measured() -> None:
    for yes, verdict in ((True, "holds"), (False, "fails")):
        made = claims(*study_of(yes))
        assert len(made) == 16
        assert {c.said: c.verdict for c in made if c.verdict != verdict} == {}
