"""The page of each of the three questions, and a change that was run beside what a result says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import OPTIMIZERS
from setups import full
from test_page import Opened
from training import Trained, train

import attrib
from attrib import errors
from attrib.intervention import Drop, Options, Reweight
from attrib.report import figures, text, write
from attrib.report.payload import payload
from attrib.result import Labelled

SETUP = full()
SHOWN = {"describe": SETUP.describe, "describe_query": SETUP.describe_query, "tag": SETUP.tag}
MEASUREMENT = SETUP.measurement["log_prob"].select([0, 1, 2])
DROPPED = [3, 5, 7, 11]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Forty examples, twenty steps, momentum and decay."""
    folder = tmp_path_factory.mktemp("questions")
    return train(folder / "run", OPTIMIZERS["sgd nesterov decay"], steps=20, examples=40, batch=9)


@pytest.fixture(scope="module")
def changed(trained: Trained) -> Callable[[str], attrib.Run]:
    """A replay with some examples dropped, or with whatever else is named."""
    place = Path(trained.run.reader.target).parent
    changes: dict[str, Any] = {
        "dropped": [Drop(DROPPED)],
        "mixed": [Reweight({3: 2.0}), Options({"lr": lambda step, recorded: recorded / 2}, slice(2, 9))],
        "options": [Options({"lr": 0.05})],
    }

    def run(name: str) -> attrib.Run:
        if not (place / name).exists():
            options = {"loss": trained.case.loss, "store": place / name, "progress": False}
            attrib.replay(trained.run, 0, changes[name], model=trained.model, **options)
        return attrib.open_run(place / name)

    return run


Asking = Callable[..., Any]


@pytest.fixture(scope="module")
def asked(trained: Trained, changed: Callable[[str], attrib.Run]) -> Asking:
    """The answer to a question, asked once: "accounting", "influence", or "difference" with a run and a via."""
    known: dict[Any, Labelled] = {}

    def ask(question: str, name: str = "dropped", via: str = "cause") -> Any:
        if (question, name, via) not in known:
            options = {"loss": trained.case.loss, "groups": SETUP.groups, "progress": False}
            place = trained.run, trained.model, MEASUREMENT
            if question == "accounting":
                known[question, name, via] = attrib.attribute(*place, **options)
            elif question == "influence":
                known[question, name, via] = attrib.influence(*place, **options)
            else:
                runs = trained.run, changed(name)
                known[question, name, via] = attrib.difference(*runs, *place[1:], via=via, **options)
        return type(known[question, name, via])(known[question, name, via].dataset.copy(deep=True))

    return ask


QUESTIONS = {
    "accounting": ("what each example contributed to the change that happened", "without an example"),
    "influence": ("what would change if an example weighed a little less", "its numbers add up to nothing"),
    "difference": (
        "why these two runs differ, exactly",
        "what each example contributed to what happened in either run",
    ),
}


@pytest.mark.parametrize("question", ["difference", pytest.param("influence", marks=pytest.mark.slow)])
def test_the_page_shows_what_the_result_holds_and_which_question_it_answers(
    question: str, asked: Asking, browser: Any, tmp_path: Path
) -> None:
    result = asked(question)
    opened = Opened(browser, write(result, tmp_path / "report.html", **SHOWN))
    head = opened.page.inner_text("#asked")
    assert all(words in head for words in QUESTIONS[question])
    want = {k.replace("_", " "): float(v[0]) for k, v in result.ledger().terms.items()}
    assert opened.terms() == pytest.approx({**opened.terms(), **want}, rel=1e-12)
    assert opened.page.is_visible("#waterfall") == (question == "difference")
    *groups, line = opened.chart("timeline")
    for trace, values in zip(groups, result.timeline()[0].values.T, strict=True):
        np.testing.assert_allclose(trace["y"], values, rtol=1e-6, atol=1e-7)  # float32
    np.testing.assert_allclose(line["y"], result.trace[0], rtol=1e-6)
    assert opened.page.evaluate("document.getElementById('timeline').layout.yaxis2.type") == "log"
    sums = result.by("example")[0].to_series()
    for name, wanted in (("top", sums[sums > 0].nlargest(10)), ("bottom", sums[sums < 0].nsmallest(10))):
        np.testing.assert_allclose(list(opened.table(name).values()), wanted, rtol=1e-5, atol=1e-7)
    assert result.word in opened.page.inner_text("#top thead")
    assert opened.page.is_hidden("#really-section")
    for bar, name in zip(opened.chart("layers"), ["train examples", "reduction"], strict=False):
        rows = result.by("step", "group") if name == "train examples" else result.dataset[name]
        assert bar["name"] == name
        np.testing.assert_allclose(bar["x"], rows[0].sum("step"), rtol=1e-5, atol=1e-7)
    shown = opened.page.inner_text("#identities")
    for said in {"difference": ("gross / |net|", "via cause"), "influence": ("tangent", "curvature")}[question]:
        assert said in shown
    assert "sensitivity" in shown
    opened.page.close()
    assert opened.wrong == []


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_head_says_what_is_answered_and_what_is_not(question: str, asked: Asking) -> None:
    words = payload(asked(question), None, None, None, False)["words"]
    answered, silent = QUESTIONS[question]
    assert answered in words["asked"]
    assert silent in words["silent"]
    assert not any("{" in value for name, value in words.items() if name not in ("title", "answer", "signs"))


@pytest.mark.parametrize("name", ["dropped", "mixed"])
def test_the_timeline_of_a_difference_is_all_that_stands_at_its_steps(name: str, asked: Asking) -> None:
    found = asked("difference", name)
    beside = sum(found.dataset[n].sum("group") for n in ("start", "buffers") if n in found.dataset)
    want = found.change - found.residual - beside
    np.testing.assert_allclose(found.timeline().sum(["step", "group"]), want, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(found.trace[:, -1], 1.0)


def test_timelines_of_every_question_are_drawn_and_printed(asked: Asking, tmp_path: Path) -> None:
    for question, line in (("accounting", "measurement"), ("influence", "sensitivity"), ("difference", "sensitivity")):
        result = asked(question)
        assert line in text.timeline(result, 0, 4).splitlines()[0]
        figures.save(tmp_path / f"{question}.svg", lambda ax, result=result: figures.timeline(result, 1, ax))
    influence = asked("influence")
    np.testing.assert_array_equal(influence.timeline(), influence.by("step", "group"))
    assert influence.measured_units == "nats"


def test_what_takes_the_sense_from_a_result_stands_in_its_head_and_ledger(asked: Asking) -> None:
    difference, influence = asked("difference"), asked("influence")
    assert difference.warning == influence.warning == ""
    difference.dataset["gross"][0] = 130 * abs(difference.change[0])
    influence.dataset["growth"][0, 3] = 2e3 * influence.dataset["growth"][0, -1]
    for result, words in (
        (difference, "130 times what they sum to"),
        (influence, "grew to 2e+03 times that at the end"),
    ):
        assert words in result.warning
        queries = payload(result, None, None, None, False)["queries"]
        assert words in queries[0]["warning"]
        assert queries[1]["warning"] == ""
    assert "at most 130, above 100: little can be read" in str(difference.ledger())
    assert "no derivative predicts" in influence.warning


def test_what_was_not_kept_along_steps_is_said(asked: Asking, trained: Trained, tmp_path: Path) -> None:
    options = {"loss": trained.case.loss, "progress": False, "keep": ("example",)}
    found = payload(attrib.influence(trained.run, trained.model, MEASUREMENT, **options), None, None, None, False)
    assert found["timeline"]["shape"] == [3, 20, 0]
    assert found["layers"] is None
    assert any("Influences were not kept along steps and groups" in notice for notice in found["notices"])


# beside


@pytest.mark.parametrize("question", ["accounting", pytest.param("influence", marks=pytest.mark.slow)])
def test_what_dropping_did_stands_beside_what_was_said(
    question: str, asked: Asking, browser: Any, tmp_path: Path
) -> None:
    result, difference = asked(question), asked("difference")
    opened = Opened(browser, write(result, tmp_path / "report.html", **SHOWN, difference=difference))
    read = """() => [...document.querySelectorAll('#really tbody tr')].map((r) => [
        (r.querySelector('.id') || r.querySelector('th')).textContent,
        ...[...r.querySelectorAll('.number')].map((c) => c.dataset.value === undefined ? null : +c.dataset.value)])"""
    rows = {name: values for name, *values in opened.page.evaluate(read)}
    said, done = result.by("example")[0].to_series(), difference.by("example")[0].to_series()
    for example in DROPPED:
        np.testing.assert_allclose(rows[str(example)], [said[example], done[example]], rtol=1e-12)
    sums = [said[DROPPED].sum(), done.sum()]
    np.testing.assert_allclose(rows["these 4 examples"], sums, rtol=1e-12)
    assert rows["reduction"] == [None, pytest.approx(float(difference.dataset["reduction"][0].sum()))]
    assert rows["net change"] == [None, pytest.approx(float(difference.change[0]))]
    assert opened.page.inner_text("#really-title") == "Dropped for real"
    sentence = opened.page.inner_text("#really-said").replace("\N{MINUS SIGN}", "-")
    foretold = float(attrib.Influence(asked("influence").dataset).predict([DROPPED])[0, 0] - result.final[0])
    number = sums[0] if question == "accounting" else foretold
    for value in (number, float(difference.change[0]), done.sum()):
        assert f"{value:+.4g}" in sentence
    read = """() => [...document.querySelectorAll('#top tbody tr, #bottom tbody tr')].map((r) => [
        +r.cells[0].textContent, r.cells[4].dataset.value])"""
    cells = dict(opened.page.evaluate(read))
    assert {e for e, value in cells.items() if value is not None} == set(cells) & set(DROPPED) != set()
    opened.page.close()
    assert opened.wrong == []


def test_a_reaction_beside_tells_apart_what_the_dropped_no_longer_did(asked: Asking) -> None:
    difference = asked("difference", via="reaction")
    (one, *_) = payload(asked("accounting"), None, None, None, False, difference)["really"]
    each = difference.by("example")[0].to_series()
    totals = {name: done for name, _, done in one["totals"]}
    np.testing.assert_allclose(totals["these 4 examples"], each[DROPPED].sum(), rtol=1e-12)
    np.testing.assert_allclose(totals["all other examples"], each.drop(DROPPED).sum(), rtol=1e-9)
    assert sorted(one["ids"]) == sorted(map(str, DROPPED))
    assert "how all other examples reacted" in " ".join(one["sentences"])


def test_what_was_done_is_said(asked: Asking) -> None:
    (one, *_) = payload(asked("influence"), None, None, None, False, asked("difference", "mixed"))["really"]
    assert one["sentences"][0] == "In the changed run: 1 example weighed otherwise, Options from step 2 to 8."
    assert one["title"] == "Changed for real"
    assert not any("first order" in sentence for sentence in one["sentences"])  # a weight of 2 is none of leaving out
    facts = dict(payload(asked("difference", "mixed"), None, None, None, False)["facts"])
    assert facts["done in it"] == "1 example weighed otherwise, Options from step 2 to 8"


def renamed(found: Labelled, **attrs: Any) -> Any:
    return type(found)(found.dataset.assign_attrs(attrs))


def moved(found: Labelled) -> Any:
    return type(found)(found.dataset.assign(initial=found.dataset["initial"] + 0.01))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda ask: ask("influence"), "got Influence beside Result"),
        (lambda ask: renamed(ask("difference"), recorded="2020"), "got another run, recorded at, '2020'"),
        (
            lambda ask: renamed(ask("difference"), measurement="margin"),
            "another measurement, 'margin', expected 'log_prob'",
        ),
        (lambda ask: ask("difference").select([0, 2]), "lacks queries: got 0, 2, expected 1 among them"),
        (lambda ask: moved(ask("difference")), "is not of what this result explains: got"),
        (lambda ask: ask("difference", "options", "reaction"), "does not say to which examples"),
    ],
    ids=["kind", "run", "measurement", "queries", "end", "reaction"],
)
def test_a_difference_of_something_else_is_refused(
    made: Callable[[Asking], Any], message: str, asked: Asking, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write(asked("accounting"), tmp_path / "report.html", difference=made(asked))
    assert not list(tmp_path.iterdir())


def test_what_is_no_result_has_no_page(asked: Asking, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a page shows a result: got Dataset"):
        write(asked("influence").dataset, tmp_path / "report.html")
    with pytest.raises(ValueError, match="got Difference beside Difference"):
        write(asked("difference"), tmp_path / "report.html", difference=asked("difference"))
    short = attrib.Difference(asked("difference").dataset.drop_vars("contribution_step_example_group"))
    with pytest.raises(errors.KeptAxesError):
        write(short, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_pages_of_every_question(
    asked: Asking, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attrib.cli import main

    places = {name: str(tmp_path / name) for name in QUESTIONS}
    for name, place in places.items():
        asked(name).save(place)
        assert main(["report", place, "-o", f"{place}.html", "--json"]) == 0
        assert main(["timeline", place, "--json"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert "sensitivity" in json.loads(line)[0]
    for name in ("accounting", "influence"):
        assert main(["report", places[name], "--difference", places["difference"], "-o", f"{tmp_path}/both.html"]) == 0
    capsys.readouterr()
    assert main(["report", places["accounting"], "--difference", places["influence"], "-o", f"{tmp_path}/x.html"]) == 1
    assert "this is about differences: got Influence" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
