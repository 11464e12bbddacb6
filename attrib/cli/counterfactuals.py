"""Commands that answer counterfactuals: influence, difference."""

import argparse
from typing import Any

from ..causes import VIA
from ..difference import difference
from ..influence import influence
from ..report import to_json
from ..result import Labelled, check_place
from ..run import open_run
from ..setup import load_setup, select
from .options import AXES, add_setup, axes, command, numbers, size


def add(commands: Any) -> None:
    made = command(commands, "influence", _influence, "what would change if an example weighed less", "RUN")
    _add_question(made, "influence.zarr")
    made.add_argument("--weights", type=float, metavar="W", help="of all losses, that it is taken at, such as 0.8 (1)")
    made.add_argument("--retrainings", type=int, default=0, metavar="K", help="to hold what was foretold against (0)")
    made.add_argument("--clip", type=float, metavar="NORM", help="that gradients were clipped to, inf for none")
    made = command(commands, "difference", _difference, "why two runs over the same batches differ", "BASE", "CHANGED")
    _add_question(made, "difference.zarr")
    made.add_argument("--via", choices=VIA, default=VIA[0], help="what was done, or how all examples reacted (cause)")


def _add_question(made: argparse.ArgumentParser, out: str) -> None:
    add_setup(made, required=True)
    made.add_argument("-o", "--out", default=out, metavar="RESULT", help=f"where to save it ({out})")
    made.add_argument("--overwrite", action="store_true", help="replace a result that is there")
    made.add_argument("--measurement", metavar="NAME", help="which of the setup's measurements, where it has several")
    made.add_argument("--queries", type=numbers, metavar="Q", help="which queries of the measurement, such as 0,3,5:8")
    made.add_argument("--keep", type=axes, action="append", metavar="AXES", help=AXES + "; several times for several")
    made.add_argument("--memory", type=size, metavar="BYTES", help="to hold at most, such as 2G or 500M")


def _influence(options: argparse.Namespace) -> int:
    check_place(options.out, options.overwrite)
    run = open_run(options.run)
    model, measurement, asked = _asked(run, options)
    how = {"weights": options.weights, "retrainings": options.retrainings, "clip": options.clip}
    found = _saved(influence(run, model, measurement, **how, **asked), options)
    _say(found, found.check(), options)
    return 0


def _difference(options: argparse.Namespace) -> int:
    check_place(options.out, options.overwrite)
    base, changed = open_run(options.base), open_run(options.changed)
    model, measurement, asked = _asked(base, options)
    found = _saved(difference(base, changed, model, measurement, via=options.via, **asked), options)
    _say(found, str(found.check()), options)
    return 0


def _asked(run: Any, options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The model, with what the run ended in, the measurement, and what either question takes."""
    setup = load_setup(options.setup)
    measurement = select(setup.choose(options.measurement), options.queries)
    run.load(setup.model, run.steps)
    asked = {"loss": setup.loss, "groups": setup.groups, "keep": options.keep, "memory": options.memory}
    return setup.model, measurement, {**asked, "progress": not options.json}


def _saved(found: Any, options: argparse.Namespace) -> Any:
    """Its queries under the numbers that they were asked for by."""
    if options.queries is not None:
        found = type(found)(found.dataset.assign_coords(query=options.queries))
    found.save(options.out, options.overwrite)
    return found


def _say(found: Labelled, checked: str, options: argparse.Namespace) -> None:
    if options.json:
        print(to_json({"result": options.out, "checked": checked.splitlines(), "top": found.top(5).to_dict("records")}))
    else:
        print(f"{found!r}\n\n{checked}\n\nsaved to {options.out}; see it with: attrib report {options.out}")
