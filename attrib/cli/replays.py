"""The command replay: train on from a step of a recorded run, as it was or changed."""

import argparse
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import SetupError
from ..intervention import Drop, Freeze, Intervention, Options, Redraw, Reweight, Suppress, Transplant, replay
from ..report import to_json
from ..run import open_run
from ..setup import call, load_setup
from .options import add_setup, command, count, ids, window

EXAMPLES = """Groups are names or patterns of parameters, separated by commas; windows are steps of RUN. Several of an option
and several options compose, in the order of this list:
  --redraw '*'   --transplant 'hidden.*'=other.zarr@1400   --freeze 'embedding.*'@500:700
  --drop 3,17,20:30@500:   --drop doc-3,doc-17   --reweight 3,17=0.5   --suppress 'output.*'=0.1@:500
  --option lr=0.001@500:600   --intervene my_script.py:changes
Ids that are strings and hold commas are given by a function, with --intervene.
A loop that took the mean of its losses and clipped gradients by norm takes --clip NORM; one that did something else is
replayed in Python, with backward=."""


def add(commands: Any) -> None:
    made = command(commands, "replay", _replay, "train on from a step of a stored run, as it was or changed", "RUN")
    made.formatter_class, made.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES
    add_setup(made, required=True)
    made.add_argument("-o", "--out", default="replay.zarr", metavar="STORE", help="the new run (replay.zarr)")
    made.add_argument("--overwrite", action="store_true", help="replace a store that is there")
    made.add_argument("--start", type=count, default=0, metavar="STEP", help="the state to begin with (0)")
    made.add_argument("--until", type=count, metavar="STEP", help="the step to end before; by default where RUN ends")
    made.add_argument("--state", choices=("kept", "reset", "taken"), default="reset",
                      help="optimizer state of transplanted groups; of redrawn ones, kept or reset (reset)")  # fmt: skip
    made.add_argument("--seed", type=int, default=0, help="of groups drawn anew (0)")
    made.add_argument(
        "--clip", type=_norm, metavar="NORM", help="the loop clipped the gradient of the mean loss by norm"
    )
    for name, read, meta, what in (
        ("redraw", str, "GROUPS", "parameters drawn anew, as their modules do"),
        ("transplant", _transplant, "GROUPS=RUN@STEP", "parameters from a state of a run"),
        ("freeze", _with_window(str), "GROUPS[@A:B]", "parameters that do not move"),
        ("drop", _with_window(str), "IDS[@A:B]", "train examples left out"),
        ("reweight", _with_window(_weight), "IDS=WEIGHT[@A:B]", "losses of train examples times a weight"),
        ("suppress", _with_window(_pull), "GROUPS=WEIGHT[@A:B]", "parameters pulled towards zero"),
        ("option", _with_window(_option), "NAME=VALUE[@A:B]", "another value of an option of the optimizer"),
        ("intervene", str, "MODULE:FUNCTION", "function that returns interventions"),
    ):
        made.add_argument(f"--{name}", type=read, action="append", default=[], metavar=meta, help=what)


def _replay(options: argparse.Namespace) -> int:
    setup = load_setup(options.setup)
    if setup.loss is None:
        raise SetupError(f"a replay needs the loss: got None, expected the recorded loss, at {options.setup}.")
    run = open_run(options.run)
    made = replay(
        run,
        options.start,
        _interventions(options, run.ids.strings),
        model=setup.model,
        loss=setup.loss,
        store=options.out,
        until=options.until,
        backward=None if options.clip is None else _clipped(options.clip),
        progress=not options.json,
        overwrite=options.overwrite,
    )
    facts = {"store": options.out, "steps": made.steps, **made.header["replay"]}
    print(to_json(facts) if options.json else f"{made}\n\nsaved to {options.out}")
    return 0


def _interventions(options: argparse.Namespace, strings: bool) -> list[Intervention]:
    """strings: whether those are the ids of the run."""
    made: list[Intervention] = []
    for groups in options.redraw:
        kept = "kept" if options.state == "kept" else "reset"
        made.append(Redraw(groups.split(","), None, options.seed, kept))
    for groups, place, step in options.transplant:
        made.append(Transplant(groups, open_run(place), step, options.state))
    made += [Freeze(groups.split(","), steps) for groups, steps in options.freeze]
    made += [Drop(ids(text, strings), steps) for text, steps in options.drop]
    made += [Reweight(dict.fromkeys(ids(text, strings), weight), steps) for (text, weight), steps in options.reweight]
    made += [Suppress(groups, weight, steps) for (groups, weight), steps in options.suppress]
    made += [Options(values, steps) for values, steps in options.option]
    for where in options.intervene:
        found = call(where)
        made += [found] if isinstance(found, Intervention) else list(found)
    return made


def _clipped(norm: float) -> Callable[[Tensor, nn.Module], None]:
    """What such a loop does before its step."""

    def backward(losses: Tensor, model: nn.Module) -> None:
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), norm)

    return backward


def _norm(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise argparse.ArgumentTypeError(f"not a norm: got {text!r}, expected such as 1.0")
    return found


def _transplant(text: str) -> tuple[list[str], str, int]:
    """hidden.*=other.zarr@1400."""
    groups, _, source = text.partition("=")
    place, _, step = source.rpartition("@")
    if not groups or not place or not step.isdecimal():
        raise argparse.ArgumentTypeError(f"not a transplant: got {text!r}, expected such as hidden.*=other.zarr@1400")
    return groups.split(","), place, int(step)


def _with_window(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, slice | None]]:
    def reads(text: str) -> tuple[Any, slice | None]:
        what, at, steps = text.rpartition("@")
        if not at or set(steps) - set("0123456789:-"):  # such as an address among the ids
            return read(text), None
        return read(what), window(steps)

    return reads


def _weight(text: str) -> tuple[str, float]:
    """3,17=0.5."""
    try:
        examples, weight = text.rsplit("=", 1)
        return examples, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not weights: got {text!r}, expected such as 3,17=0.5") from None


def _pull(text: str) -> tuple[list[str], float]:
    """hidden.*=0.1."""
    groups, _, weight = text.partition("=")
    try:
        return groups.split(","), float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a pull: got {text!r}, expected such as hidden.*=0.1") from None


def _option(text: str) -> dict[str, Any]:
    """lr=0.1, or betas=0.9,0.98."""
    name, _, value = text.partition("=")
    try:
        found = [float(part) for part in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not an option: got {text!r}, expected such as lr=0.1") from None
    return {name: found[0] if len(found) == 1 else tuple(found)}
