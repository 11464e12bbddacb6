"""The study of development: its networks, its windows and its branches are what they say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attrib
from attrib.intervention import Freeze, Suppress
from attrib.studies.development import networks, recipe
from attrib.studies.development.claims import claims
from attrib.studies.development.networks import LOOKS, SETTINGS, Network
from attrib.studies.development.recipe import OtherBatches
from attrib.studies.development.tables import Planted, Tables
from attrib.studies.parts import Parts, SeedParts
from attrib.studies.recipe import cross_entropy

TOY = SETTINGS["toy"]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, attrib.Run]:
    network, store = TOY.networks()[0], tmp_path_factory.mktemp("digits") / "run.zarr"
    with torch.random.fork_rng(devices=()):
        network.train(0, store)
    return network, attrib.open_run(store)


def test_looks_and_queries_are_those_of_the_model(digits_run: tuple[Network, attrib.Run]) -> None:
    network, run = digits_run
    model = network.build()
    run.load(model, run.steps)
    with torch.no_grad():
        outputs = model(network.x[network.held_out])
    y = network.y[network.held_out]
    looks = dict(zip(LOOKS, network.looks(model).tolist(), strict=True))
    assert looks["held-out accuracy"] == pytest.approx(float((outputs.argmax(1) == y).float().mean()))
    log_probs = outputs.log_softmax(1)[torch.arange(len(y)), y]
    assert looks["held-out loss"] == pytest.approx(-float(log_probs.mean()), rel=1e-5)
    assert network.held_out_loss(model).detach().tolist() == pytest.approx([looks["held-out loss"]], rel=1e-5)
    asked = network.queries(2)
    with torch.no_grad():
        values = asked(model)
    some = torch.arange(0, len(y), len(y) // 64)[:64]
    own = outputs[some, y[some]]
    margins = own - (outputs[some].sum(1) - own) / 9
    np.testing.assert_allclose(values[:2], [margins.mean(), log_probs[some].mean()], rtol=1e-4)
    np.testing.assert_allclose(values[2], log_probs[some[0]], rtol=1e-4)
    assert asked.names[2] == f"example {int(network.held_out[0])}"


@pytest.mark.slow  # trains again for every layer and window
def test_windows_are_interventions_by_themselves(digits_run: tuple[Network, attrib.Run]) -> None:
    network, run = digits_run
    found = recipe._windows(TOY, network, run, network.build())
    assert found["edges"] == [0, run.steps // 2, run.steps]
    assert len(found["changes"]) == 1 + 2 * TOY.windows * len(network.groups)
    middle = found["edges"][1]
    for name, change in (
        (f"frozen hidden {middle}", Freeze("hidden.*", slice(middle, run.steps))),
        (f"suppressed output {middle}", Suppress("output.*", network.pull, slice(middle, run.steps))),
    ):
        *_, (_, model) = attrib.retrain(run, middle, change, model=network.build(), loss=cross_entropy)
        at = found["changes"].index(name)
        np.testing.assert_allclose(found["looks"][at][-1], network.looks(model).detach(), rtol=1e-5)
        assert found["looks"][at][0] == found["looks"][0][0]


def test_branches_go_on_with_other_batches(digits_run: tuple[Network, attrib.Run], tmp_path: Path) -> None:
    network, run = digits_run
    start = run.steps // 2
    other = OtherBatches(run, network.x, network.y, 3)
    child = attrib.replay(
        run, start, other, model=network.build(), loss=cross_entropy, store=tmp_path / "child", progress=False
    )
    assert child.steps == run.steps - start
    for step in range(child.steps):
        index = child.index(step)
        assert len(set(index.tolist())) == len(run.index(start + step))
        assert set(index.tolist()) <= set(run.examples.tolist())
        assert set(index.tolist()) != set(run.index(start + step).tolist())
    assert child.header["replay"]["interventions"] == [{"kind": "OtherBatches", "seed": 3}]
    _, y = child.batch(0)
    assert torch.equal(y, network.y[child.index(0)])
    parts = SeedParts(Parts(tmp_path / "study", {}), 3, lambda text: None)
    (row,) = recipe._branches(TOY, parts, network, run, network.build())
    line = attrib.interpolate(run, run.steps, child, child.steps, network.build(), network.held_out_loss, TOY.positions)
    np.testing.assert_allclose(row["barrier"], attrib.barrier(line)[0], atol=1e-6)


@pytest.mark.slow  # explains a whole run, and trains again without the largest
def test_left_out_examples_are_the_largest_of_the_account(digits_run: tuple[Network, attrib.Run]) -> None:
    network, run = digits_run
    model = network.build()
    queries = network.queries(TOY.queries)
    result = attrib.attribute(run, model, queries, loss=cross_entropy, keep=("example",), progress=False)
    rows = recipe._dropped(TOY, network, run, model, result, 0)
    assert [(r["query"], r["kind"]) for r in rows] == [(2, "largest"), (2, "random")]
    largest = np.sort(result.by("example").values[2])[::-1][: TOY.dropped]
    assert rows[0]["accounted"] == pytest.approx(-largest.sum())
    ids = result.by("example")["example"].values[np.argsort(-result.by("example").values[2])[: TOY.dropped]]
    change = attrib.intervention.Drop(ids.tolist())
    *_, (_, trained) = attrib.retrain(run, 0, change, model=model, loss=cross_entropy)
    run.load(model, run.steps)
    with torch.no_grad():
        measured = float(queries(trained)[2] - queries(model)[2])
    assert rows[0]["measured"] == pytest.approx(measured, abs=1e-5)


def test_settings_name_layers_that_there_are() -> None:
    for setting in SETTINGS.values():
        for network in setting.networks():
            names = [n for n, _ in network.build().named_parameters()]
            for patterns in network.groups.values():
                assert any(n.startswith(p.rstrip("*")) for n in names for p in patterns)
            assert not set(network.trained.tolist()) & set(network.held_out.tolist())
    assert networks.SETTINGS["quick"].seeds == 5


def planted_of(early: float, late: float) -> Planted:
    """left: of the height of the early branch; output with the early branch frozen, of the untouched: `late`."""
    vestiges = {
        "gross": [2.0, 1.0],
        "net": [early, 1.0],
        "height": [1.0, 1.0],
        "left": [early, 1.0],
        "vestigial": [early < 0.25, False],
    }
    frozen = {
        "untouched": [1.0, 1.0],
        "early always": [0.0, late],
        "early before the turn": [0.0, 1.0],
        "late always": [1.0, 0.0],
    }
    found = {"vestiges": vestiges, "frozen": frozen, "ablated": {"early": 0.0, "late": -1.0}, "running": {}, "turn": 1}
    return Planted([{"seed": 0, "planted": found}])


def test_planted_layer_is_claimed_where_account_and_freezing_agree() -> None:
    assert claims([], planted_of(0.1, 1.0))[0].verdict == "holds"
    assert claims([], planted_of(0.9, 1.0))[0].verdict == "fails"  # not found
    assert claims([], planted_of(0.1, 0.3))[0].verdict == "fails"  # but needed


def stepped(at: int, steps: int = 100) -> dict[str, Any]:
    """A run whose held-out accuracy rises from 0 to 1 in ten steps from `at` on."""
    states = np.arange(steps + 1)
    right = np.clip((states - at) / 10, 0, 1)
    looks = {look: right.tolist() if look == "held-out accuracy" else (1 - right).tolist() for look in LOOKS}
    return {"steps": steps, "curve": {"states": states.tolist(), "looks": looks, "onset": {"accuracy": at, "loss": at}}}


def test_tables_tell_breakthroughs_shifts_and_basins() -> None:
    setting = networks.Setting(name="s", about="a", seeds=2, windows=1, checkpoints=(0.0, 0.5, 1.0), height=0.1)
    network = TOY.networks()[1]
    points = [f"{seed}: {share}" for seed in (0, 1) for share in ("0", "0.5", "1")]
    barriers = np.full((6, 6), 5.0)
    for a, b, v in ((1, 2, 0.09), (2, 4, 0.05), (3, 4, 0.01), (4, 5, 0.01), (3, 5, 0.01)):
        barriers[a, b] = barriers[b, a] = v
    np.fill_diagonal(barriers, 0)
    runs = []
    for seed in (0, 1):
        run, names = stepped(40), ["untouched"]
        series = [np.array([run["curve"]["looks"][look] for look in LOOKS]).T]
        for group in network.groups:
            for act, late in (("frozen", stepped(60)), ("suppressed", stepped(10_000))):  # the second never rises
                names.append(f"{act} {group} 0")
                series.append(np.array([late["curve"]["looks"][look] for look in LOOKS]).T)
        windows = {
            "edges": [0, 100],
            "states": run["curve"]["states"],
            "changes": names,
            "looks": np.array(series).tolist(),
        }
        runs.append({"seed": seed, network.name: {**run, "windows": windows}})
    late = {"edges": [50, 100], "states": windows["states"], "changes": [n.replace(" 0", " 50") for n in names],
            "looks": windows["looks"]}  # fmt: skip
    between = {"points": points, "barrier": barriers, "gap": barriers, "similar": None}
    t = Tables(setting, network, runs, between)
    np.testing.assert_allclose(t.breakthrough(), 1.0)
    shift = t.windows()["shift"]
    np.testing.assert_allclose(shift.sel(act="frozen"), 0.2)
    assert np.isnan(shift.sel(act="suppressed")).all()
    after = Tables(setting, network, [{"seed": 0, network.name: {**run, "windows": late}}], between)
    assert np.isnan(after.windows()["shift"]).all()  # it had come before
    np.testing.assert_allclose(t.windows()["loss"].sel(act="frozen"), 0.0)
    np.testing.assert_allclose(t.windows()["loss"].sel(act="suppressed"), 1.0)
    assert t.settled().tolist() == [0.5, 0.0]  # whatever other seeds there are
    assert t.ends().tolist() == [5.0]
    np.testing.assert_allclose(t.along(), [[5.0, 0.09, 0.0], [0.01, 0.01, 0.0]])
