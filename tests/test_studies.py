"""Real images and real text: recorded, rebuilt, float32, mini-batches and schedules."""

from pathlib import Path

import numpy as np
import pytest
import torch

import attrib
from attrib.checks.intake import CAPTURES
from attrib.studies import digits, modular, text
from attrib.studies.recipe import cross_entropy


@pytest.mark.slow  # real images, 88 steps
@pytest.mark.parametrize("capture", CAPTURES)
def test_digits_network_is_rebuilt(capture: str, tmp_path: Path) -> None:
    data = digits.load()
    model = digits.train(data, tmp_path / "run", epochs=4, capture=capture)
    queries = data.test[:3]
    measurement = attrib.measure.log_prob(data.x[queries], data.y[queries])
    run = attrib.open_run(tmp_path / "run")
    assert run.steps == 88
    result = attrib.attribute(run, model, measurement, loss=cross_entropy, progress=False)
    ledger = result.check(1e-5)
    assert float(abs(ledger.decay).max()) > 0
    accuracy = (model(data.x[data.test]).argmax(1) == data.y[data.test]).double().mean()
    assert accuracy > 0.8
    # the examples that raised the right answer most are mostly images of that digit
    for q, query in enumerate(queries):
        best = result.by("example").isel(query=q).to_series().nlargest(10).index.to_numpy()
        assert (data.y[torch.tensor(best)] == data.y[query]).double().mean() >= 0.5


@pytest.mark.slow  # a language model on real text
def test_small_gpt_on_source_text_is_rebuilt(tmp_path: Path) -> None:
    data = text.load()
    model = text.train(data, tmp_path / "run", steps=30, batch=8)
    x, y = data.passages(torch.arange(len(data) - 2, len(data)))
    run = attrib.open_run(tmp_path / "run")
    result = attrib.attribute(run, model, attrib.measure.log_prob(x, y), loss=cross_entropy, progress=False)
    ledger = result.check(1e-5)
    assert float((ledger.final - ledger.initial).min()) > 10  # it learned
    assert len(data.describe(5)) == data.length + 1


def test_explaind_network_has_the_published_size() -> None:
    assert sum(p.numel() for p in modular.PairTransformer().parameters()) == 89_024
    pairs = modular.unordered_pairs()
    assert (len(pairs.x), len(pairs.train)) == (6441, 4000)
    assert set(pairs.train.tolist()).isdisjoint(pairs.test.tolist())
    a, b = pairs.operands(100)
    assert int(pairs.y[100]) == (a + b) % 113
    assert modular.PairTransformer()(pairs.x[:2]).shape == (2, 115)


def test_quick_setting_has_its_published_size() -> None:
    pairs = modular.ordered_pairs(31, 0.5, 0)
    assert len(pairs.train) == 480
    assert sum(p.numel() for p in modular.PairMlp(31).parameters()) == 13_152
    a, b = pairs.operands(77)
    assert pairs.describe(77) == f"{a} + {b} = {(a + b) % 31}"
    np.testing.assert_array_equal(pairs.y, pairs.x.sum(1) % 31)
