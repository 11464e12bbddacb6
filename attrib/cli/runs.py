"""Commands on recorded runs: demo, info, verify, compact, plan, attribute."""

import argparse
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ..attribute import attribute
from ..checks import SHARES
from ..errors import Interrupted
from ..plan import QUESTIONS, plan
from ..report import to_json
from ..result import Result, check_place
from ..run import open_run
from ..setup import load_setup, select
from ..store import compact
from ..verify import verify
from .options import AXES, add_setup, axes, command, numbers, positive, size, window


def add(commands: Any) -> None:
    made = command(
        commands, "demo", _demo, "train a small network, recorded, and account for its predictions", json=False
    )
    made.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the run, the result, the pictures")
    made.add_argument("--seed", type=int, default=0)
    command(commands, "info", _info, "what a stored run holds", "RUN")
    made = command(commands, "verify", _verify, "read a stored run whole and check its identities again", "RUN")
    add_setup(made, required=False)
    command(commands, "compact", _compact, "store a finished run in less room, nothing of it lost", "RUN")
    made = command(commands, "plan", _plan, "what a question about a stored run will take: memory, time, disk", "RUN")
    made.add_argument("--question", choices=QUESTIONS, default=QUESTIONS[0], help="which is asked (accounting)")
    made.add_argument("--queries", type=int, default=1, metavar="Q")
    made.add_argument("--memory", type=size, metavar="BYTES", help="to hold at most, such as 2G or 500M")
    made = command(
        commands, "attribute", _attribute, "explain measurements by the train examples of a stored run", "RUN"
    )
    add_setup(made, required=True)
    made.add_argument("-o", "--out", default="result.zarr", metavar="RESULT", help="where to save it (result.zarr)")
    made.add_argument("--overwrite", action="store_true", help="replace a result that is there")
    made.add_argument("--measurement", metavar="NAME", help="which of the setup's measurements, where it has several")
    made.add_argument("--queries", type=numbers, metavar="Q", help="which queries of the measurement, such as 0,3,5:8")
    made.add_argument("--window", type=window, metavar="A:B", help="the change between two states, such as 100:200")
    made.add_argument("--keep", type=axes, action="append", metavar="AXES", help=AXES + "; several times for several")
    made.add_argument("--memory", type=size, metavar="BYTES", help="to hold at most, such as 2G or 500M")
    made.add_argument("--shares", choices=SHARES, help="what a share is (what it is in the run)")
    made.add_argument("--workers", type=positive, metavar="N", help="processes that share the work (this one alone)")


def _demo(options: argparse.Namespace) -> int:
    from ..studies.demo import demo  # brings matplotlib along

    demo(options.out, options.seed)
    return 0


def _info(options: argparse.Namespace) -> int:
    run = open_run(options.run)
    print(to_json(run.header, indent=2) if options.json else run)
    return 0


def _plan(options: argparse.Namespace) -> int:
    found = plan(open_run(options.run), options.queries, options.memory, question=options.question)
    print(to_json(asdict(found)) if options.json else found)
    return 0


def _compact(options: argparse.Namespace) -> int:
    found = compact(options.run)
    if options.json:
        print(to_json(found._asdict()))
    else:
        print(
            f"{found.before} bytes before, {found.after} after, {found.after / found.before:.2f} of them: {options.run}"
        )
    return 0


def _verify(options: argparse.Namespace) -> int:
    run = open_run(options.run)
    setup = load_setup(options.setup) if options.setup else None
    if setup is not None:
        run.load(setup.model, run.steps)
    found = verify(run) if setup is None else verify(run, model=setup.model, loss=setup.loss)
    if options.json:
        figures = {name: {"steps": count, "largest": gap} for name, (count, gap) in found.identities.items()}
        print(to_json({"chunks": found.chunks, "identities": figures, "failure": found.failure}))
    else:
        print(found)
        if run.capture == "replay" and setup is None:
            print('shares were not stored (capture="replay"): attrib.attribute checks them at every step it visits')
    return 1 if found.failure else 0


def _attribute(options: argparse.Namespace) -> int:
    check_place(options.out, options.overwrite)
    run, setup = open_run(options.run), load_setup(options.setup)
    measurement = select(setup.choose(options.measurement), options.queries)
    run.load(setup.model, run.steps)
    asked = {"loss": setup.loss, "groups": setup.groups, "steps": options.window, "keep": options.keep}
    asked |= {"memory": options.memory, "progress": not options.json, "shares": options.shares}
    try:
        with _workers(options.workers) as executor:
            result = attribute(run, setup.model, measurement, executor=executor, **asked)
    except Interrupted as stopped:
        _saved(stopped.result, options)
        raise Interrupted(f"interrupted; what was done is complete and saved: {options.out}", stopped.result) from None
    result = _saved(result, options)
    ledger = result.ledger()
    if options.json:
        queries = ledger.to_pandas().reset_index().to_dict("records")
        print(to_json({"result": options.out, "queries": queries, "identities": ledger.identities}))
    else:
        print(f"{result!r}\n\nsaved to {options.out}; see it with: attrib report {options.out} -o report.html")
    return 0


@contextmanager
def _workers(count: int | None) -> Iterator[Executor | None]:
    """So many processes, the machine's threads shared among them."""
    if count is None:
        yield None
        return
    threads = max(1, torch.get_num_threads() // count)
    with ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (threads,)) as executor:
        yield executor


def _saved(result: Result, options: argparse.Namespace) -> Result:
    """Saved, its queries under the numbers that they were asked for by."""
    if options.queries is not None:
        result = Result(result.dataset.assign_coords(query=options.queries[: result.dataset.sizes["query"]]))
    result.save(options.out, options.overwrite)
    return result
