"""The grokking study: its measures against plain computations, its parts kept, its page whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr

from attrib import errors
from attrib.cli import main
from attrib.studies import grokking, modular
from attrib.studies.grokking import fourier, grafts, seed
from attrib.studies.grokking.setting import QUICK, SETTINGS, TOY
from attrib.studies.grokking.speeds import beats, by_seed, times
from attrib.studies.parts import Parts
from attrib.studies.verdicts import span, verdict

P = 11


def waves(*keys: int) -> torch.Tensor:
    """Logits cos(k (a + b - c)) summed over the keys, (p, p, p): what a network of these frequencies puts out."""
    n = torch.arange(P, dtype=torch.float64)
    return sum(torch.cos(2 * torch.pi * k / P * (n[:, None, None] + n[None, :, None] - n)) for k in keys)


def test_restriction_keeps_the_key_frequencies_of_the_sum_and_nothing_else() -> None:
    found = fourier.restrict(waves(2, 5) + 3.0, [2])
    sums = torch.arange(P)
    expected = waves(2)[sums, 0]  # b = 0: of each sum
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # sums of 121 terms of size 1
    other = torch.cos(2 * torch.pi * 3 / P * torch.arange(P)).double()[:, None, None].expand(P, P, P)  # of a alone
    torch.testing.assert_close(fourier.restrict(other, [3]), torch.zeros(P, P).double(), rtol=0, atol=1e-12)


def test_frequencies_are_shares_of_the_neurons_variance() -> None:
    n = torch.arange(P, dtype=torch.float64)
    a, b = n[:, None].expand(P, P), n[None].expand(P, P)
    neurons = torch.stack(
        [torch.cos(2 * torch.pi * 2 / P * a), 2 * torch.cos(2 * torch.pi * 4 / P * (a + b)) + 7.0,
         torch.cos(2 * torch.pi / P * a) * torch.cos(2 * torch.pi * 3 / P * b)], 2,
    )  # fmt: skip
    # variances 1/2, 4/2 and 1/4; the last mixes two frequencies and belongs to none
    np.testing.assert_allclose(fourier.frequencies(neurons), np.array([0, 0.5, 0, 2, 0]) / 2.75, atol=1e-12)
    many = np.full(50, 0.01)
    many[[1, 2, 3]] = 0.3, 0.06, 0.5
    assert fourier.key_frequencies(many) == [4, 2, 3]  # a twentieth or more
    assert fourier.key_frequencies(np.array([0.02, 0.3, 0.06, 0.5, 0.04])) == [4]  # twice an even share
    assert fourier.key_frequencies(np.array([0.01, 0.02])) == [2]


class Waving(torch.nn.Module):
    """A network whose logits are waves of known frequencies, and whose neurons are its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden(20 * waves(2, 5)[x[:, 0], x[:, 1]])


def test_restricted_and_excluded_losses_are_those_of_plain_logits() -> None:
    pairs = modular.ordered_pairs(P, 0.6, 0)
    setting = SETTINGS["toy"].__class__(**{**TOY.__dict__, "p": P})
    found = fourier.progress(setting, Waving(), pairs, [2])
    test, train = ((pairs.x[i].T, pairs.y[i]) for i in (pairs.test, pairs.train))
    alone = F.cross_entropy(20 * waves(2)[test[0][0], test[0][1]], test[1])
    without = F.cross_entropy(20 * waves(5)[train[0][0], train[0][1]], train[1])
    assert found["restricted"] == pytest.approx(float(alone), rel=1e-9)
    assert found["excluded"] == pytest.approx(float(without), rel=1e-9)


def test_parts_are_computed_once_and_a_torn_line_again(tmp_path: Path) -> None:
    facts, calls = {"study": "s", "setting": "t"}, []

    def compute(value: Any) -> Any:
        calls.append(value)
        return value

    parts = Parts(tmp_path / "study", facts)
    for _ in range(2):
        assert parts.part("seed0/a", lambda: compute({"x": 1.5, "lost": float("nan")})) == {"x": 1.5, "lost": None}
        assert parts.trial("seed0/trials", "k", lambda: compute(3)) == 3
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="stopped"):
        parts.part("seed0/b", lambda: (_ for _ in ()).throw(RuntimeError("stopped")))
    assert not (tmp_path / "study/seed0/b.json").exists()
    with (tmp_path / "study/seed0/trials.jsonl").open("a") as file:
        file.write('["torn", {"gener')
    again = Parts(tmp_path / "study", facts)
    assert again.trial("seed0/trials", "k", lambda: compute(4)) == 3
    assert again.trial("seed0/trials", "torn", lambda: compute(5)) == 5
    assert Parts(tmp_path / "study", facts).trial("seed0/trials", "torn", lambda: compute(6)) == 5
    with pytest.raises(errors.StoreExistsError, match="another study"):
        Parts(tmp_path / "study", {**facts, "setting": "u"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(errors.StoreExistsError, match="something other"):
        Parts(tmp_path / "mine", facts)
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_verdicts_and_spans_count_what_was_not_reached() -> None:
    assert [verdict([True] * n + [False] * (5 - n)) for n in range(6)] == [
        *("fails", "fails", "depends", "depends", "holds", "holds")
    ]
    assert span([3, 1, 2]) == "2 (1 to 3)"
    assert span([3, 1, float("nan")]) == "3 (1 to 3, 1 of 3 not reached)"
    assert span([1, float("nan"), float("nan")]) == "not reached (1 to 1, 2 of 3 not reached)"
    assert span([float("nan")]) == "not reached"
    assert span([float("nan")] * 2) == "not reached in any of 2"
    assert span([7.25], 1) == "7.2"
    assert times([1.1, 1.2, 3, float("nan"), float("nan")]) == "1.1 (1.1 to 3.0, 2 of 5 not reached)"
    assert verdict([True, True, None]) == verdict([False, False, None]) == "depends"


class Compared:
    """Speed-ups of two conditions into one step, over six seeds: bounds of 0.5 where not reached, none without a trial."""

    nan = float("nan")
    controls = xr.Dataset(
        {"speed_up": (("condition", "put into", "seed"), [[[2, 2, nan, nan, 2, 2.0]], [[1, nan, 2, nan, nan, 1.9]]]),
         "bound": (("condition", "put into", "seed"), [[[0.5] * 6], [[0.5, 0.5, 0.5, 0.5, nan, 0.5]]])},
        {"condition": ["own", "other"], "put into": [0.25]},
    )  # fmt: skip


def test_comparisons_know_what_was_not_reached_from_what_was_not_tried() -> None:
    found = beats(Compared(), "own", "other", [0.25])  # type: ignore[arg-type]
    # faster; faster than the bound; slower; undecided; no trial; not by a tenth
    np.testing.assert_array_equal(found, [[1, 1, 0, np.nan, np.nan, 0]])
    assert by_seed([found]) == [True, True, False, False]


@pytest.mark.slow  # the whole study at toy size, killed and gone on with
def test_study_is_done_once_goes_on_after_a_kill_and_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = tmp_path / "study", []
    retrain = grafts.retrain

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(arguments[1])
        if len(made) == 5:
            raise KeyboardInterrupt
        return retrain(*arguments, **options)

    monkeypatch.setattr(grafts, "retrain", counted)
    command = ["study", "grokking", "--setting", "toy", "--seeds", "1", "--out", str(folder)]
    assert main(command) == 130
    assert not (folder / "index.html").exists()
    trials = (folder / "seed0/trials.jsonl").read_text().splitlines()
    assert len(trials) == 4
    monkeypatch.setattr(seed, "train_until_generalised", None)  # not again
    assert main(command) == 0
    after = (folder / "seed0/trials.jsonl").read_text().splitlines()
    assert after[:4] == trials
    assert len(made) == len(after) + 1
    assert len({json.loads(line)[0] for line in after}) == len(after)
    said = capsys.readouterr().out
    assert "index.html" in said
    page = (folder / "index.html").read_text()
    for word in ("Re-insertion", "Controls", "Ledgers", "change at step", "holds", "fails"):
        assert word in page
    data = {
        f.stem: xr.DataArray.from_dict(json.loads(f.read_text())).astype(float) for f in (folder / "data").iterdir()
    }
    _check_data(data, folder)
    made.clear()
    assert main([*command, "--json"]) == 0
    assert not made
    assert json.loads(capsys.readouterr().out) == {"page": str(folder / "index.html")}
    assert main(["study", "grokking", "--setting", "quick", "--out", str(folder)]) == 1
    assert "another study" in capsys.readouterr().err


def _check_data(data: dict[str, xr.DataArray], folder: Path) -> None:
    """What stands in the figures is what was measured."""
    training = json.loads((folder / "seed0/training.json").read_text())
    accuracy = data["accuracy"].sel(pairs="held out", seed=0).dropna("step")
    assert training["generalised"] == int(accuracy["step"][(accuracy >= 0.995).values][0])
    layers = data["layers"]
    balance = layers.sel(term="contribution") + layers.sel(term="decay")
    np.testing.assert_allclose(balance, layers.sel(term="balance"))
    phases = data["phases"].sel(term="balance", seed=0).sum("phase")
    np.testing.assert_allclose(phases, balance.sum("step"), rtol=1e-9)
    swaps = json.loads((folder / "seed0/swaps.json").read_text())
    assert swaps[-1]["inner kl"] == pytest.approx(0, abs=1e-6)
    assert swaps[-1]["inner accuracy"] == swaps[-1]["outer accuracy"] >= 0.995
    whole = training["generalised"]
    trials = dict(json.loads(line) for line in (folder / "seed0/trials.jsonl").read_text().splitlines())
    took = trials[f"reinsert hidden (inner) {whole} {round(0.25 * whole)}"]["generalised"]
    cell = data["reinsertions"].sel({"layers": "hidden (inner)", "taken from": 1.0, "put into": 0.25, "seed": 0})
    expected = np.nan if took is None else (whole - round(0.25 * whole)) / took
    np.testing.assert_allclose(float(cell), expected)
    np.testing.assert_array_equal(data["controls"].sel(condition="inner", seed=0).values, [expected])
    assert bool(np.isfinite(data["reinsertions"]).any())
    pruning = data["pruning accuracy"]
    assert pruning.dims == ("score", "weights kept", "seed")
    assert float(pruning.sel(score="magnitude").max()) > float(pruning.sel(score="magnitude").min())


def test_runs_that_do_not_generalise_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = TOY.__class__(**{**TOY.__dict__, "limit": 30, "seeds": 1})
    monkeypatch.setitem(SETTINGS, "toy", short)
    state = torch.get_rng_state()
    page = grokking.study(tmp_path / "study", "toy", say=lambda text: None)
    assert torch.equal(torch.get_rng_state(), state)
    assert "Seeds [0] did not generalise in 30 steps" in page.read_text()
    shutil.rmtree(tmp_path / "study")


def test_settings_that_there_are_not_are_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(errors.SetupError, match="expected one of quick, explaind, toy"):
        grokking.study(tmp_path / "study", "slow")
    with pytest.raises(errors.SetupError, match="at least 1"):
        grokking.study(tmp_path / "study", "toy", 0)
    assert not (tmp_path / "study").exists()


def test_settings_name_layers_that_there_are() -> None:
    for setting in SETTINGS.values():
        model = setting.build(setting.p)
        names = [name for name, _ in model.named_parameters()]
        assert set(setting.inner) | set(setting.outer) == set(setting.groups)
        assert not set(setting.inner) & set(setting.outer)
        for groups in (setting.inner, setting.outer, *setting.sets.values()):
            assert setting.patterns(groups)
        sizes = {
            dict(model.named_parameters())[n].shape[axis] for n, axis in {**setting.before, **setting.after}.items()
        }
        assert len(sizes) == 1
        assert set(setting.before) | set(setting.after) <= set(names)
        assert {1.0} <= set(setting.sources)
        assert set(setting.compared) <= set(setting.targets)
    assert QUICK.seeds == 5
