"""Commands on results: report, timeline, top, compare, export."""

import argparse
from pathlib import Path
from typing import Any

from ..report import compare, export, figures, text, to_json, write
from ..report.shown import Describe, said
from ..result import accounting, difference_of, open_result
from ..setup import load_setup
from .options import AXES, add_query, add_setup, axes, chosen_queries, command, positive


def add(commands: Any) -> None:
    made = command(commands, "report", _report, "write a result as one HTML page", "RESULT")
    made.add_argument("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="(report.html)")
    made.add_argument("--title")
    made.add_argument(
        "--difference", metavar="RESULT", help="of the same run: what was really done to examples, beside"
    )
    add_setup(made, required=False)
    made = command(commands, "timeline", _timeline, "what each group's updates changed, over the steps", "RESULT")
    made.add_argument("--bins", type=positive, default=12, metavar="N", help="rows of the table (12)")
    made.add_argument("-o", "--out", type=Path, metavar="FILE", help="draw it as a picture too: .png, .pdf, .svg")
    made.add_argument("--overwrite", action="store_true", help="replace a picture that is there")
    add_query(made)
    made = command(commands, "top", _top, "the train examples that contributed most", "RESULT")
    made.add_argument("-n", type=positive, default=10, metavar="N", help="so many that raised, and that lowered (10)")
    add_query(made)
    add_setup(made, required=False)
    made = command(commands, "compare", _compare, "two results beside each other")
    made.add_argument("a", metavar="RESULT")
    made.add_argument("b", metavar="RESULT")
    made.add_argument("-n", type=positive, default=10, metavar="N", help="overlap of the N largest contributions (10)")
    made = command(commands, "export", _export, "write contributions as a table", "RESULT")
    made.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help=".csv or .parquet")
    made.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    made.add_argument("--axes", type=axes, default=("example",), metavar="AXES", help=AXES + " (example)")


def _report(options: argparse.Namespace) -> int:
    result = open_result(options.result)
    setup = load_setup(options.setup) if options.setup else None
    known = {key: getattr(setup, key) for key in ("describe", "describe_query", "tag")} if setup else {}
    if options.difference is not None:
        known["difference"] = difference_of(options.difference)
    path = write(result, options.out, title=options.title, progress=not options.json, **known)
    size = path.stat().st_size
    print(to_json({"report": str(path), "bytes": size}) if options.json else f"{path}: {size / 1e6:.1f} MB")
    return 0


def _timeline(options: argparse.Namespace) -> int:
    result = open_result(options.result)
    chosen = chosen_queries(result, options.query, every=options.json)
    if options.out is not None:
        figures.save(options.out, lambda ax: figures.timeline(result, chosen[0], ax), options.overwrite)
    if options.json:
        numbers = result.dataset["query"].values
        rows = [{"query": numbers[q], "name": result.names[q], **text.binned(result, q, options.bins)} for q in chosen]
        print(to_json(rows))
    else:
        print(_which(result.names, chosen[0]) + text.timeline(result, chosen[0], options.bins))
    return 0


def _top(options: argparse.Namespace) -> int:
    result = open_result(options.result)
    describe: Describe | None = load_setup(options.setup).describe if options.setup else None
    chosen = chosen_queries(result, options.query, every=options.json)
    table = result.select(chosen).top(options.n)
    if options.json:
        rows = table.to_dict("records")
        print(to_json([{**row, "shown": said(describe, row["example"])} for row in rows] if describe else rows))
    else:
        print(_which(result.names, chosen[0]) + text.bars(table, lambda e: said(describe, e)))
    return 0


def _compare(options: argparse.Namespace) -> int:
    found = compare(accounting(options.a), accounting(options.b), options.n)
    if options.json:
        print(to_json({name: getattr(found, name).to_dict("records") for name in ("queries", "groups")}))
    else:
        print(found)
    return 0


def _export(options: argparse.Namespace) -> int:
    rows = export(open_result(options.result), options.out, *options.axes, overwrite=options.overwrite)
    print(to_json({"file": str(options.out), "rows": rows}) if options.json else f"{options.out}: {rows} rows")
    return 0


def _which(names: list[str], query: int) -> str:
    hint = f" (1 of {len(names)}: --query chooses)" if len(names) > 1 else ""
    return f"query {names[query]}{hint}\n\n"
