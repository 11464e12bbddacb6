"""The command `attrib`. Errors are one line on stderr, the exit status is 0 only if all is well."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from .errors import AttribError
from .plan import plan
from .report import text
from .run import open_run
from .verify import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        return int(options.run(options))
    except (AttribError, OSError, ValueError, ImportError) as error:
        print(f"attrib: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("attrib: interrupted; what was committed can be read", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attrib", description="Exact training attribution for PyTorch.")
    parser.add_argument("--version", action="version", version=f"attrib {version('attrib')}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is decided on the way")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("demo", help="train a small network, recorded, and account for its predictions")
    command.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for the run, the result, the figure"
    )
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=_demo)
    command = commands.add_parser("info", help="what a stored run holds")
    command.add_argument("store", metavar="RUN")
    command.add_argument("--json", action="store_true", help="the run's metadata, for machines")
    command.set_defaults(run=_info)
    command = commands.add_parser("verify", help="read a stored run whole and check its identities again")
    command.add_argument("store", metavar="RUN")
    command.add_argument("--json", action="store_true", help="the figures, for machines")
    command.set_defaults(run=_verify)
    command = commands.add_parser("plan", help="what attributing a stored run will take: memory, time, disk")
    command.add_argument("store", metavar="RUN")
    command.add_argument("--queries", type=int, default=1, metavar="Q")
    command.add_argument("--memory", type=_bytes, metavar="BYTES", help="to hold at most, such as 2G or 500M")
    command.add_argument("--json", action="store_true", help="the figures, for machines")
    command.set_defaults(run=_plan)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from .studies.demo import demo  # brings matplotlib along

    demo(options.out, options.seed)
    return 0


def _info(options: argparse.Namespace) -> int:
    run = open_run(options.store)
    print(json.dumps(run.header, indent=2) if options.json else text.describe_run(run))
    return 0


def _plan(options: argparse.Namespace) -> int:
    found = plan(open_run(options.store), options.queries, options.memory)
    print(json.dumps(asdict(found)) if options.json else found)
    return 0


def _bytes(text: str) -> int:
    """512, 500M, 2G: powers of 1024."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        return int(float(text[:-1]) * units[text[-1].upper()]) if text[-1:].upper() in units else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number of bytes: got {text!r}, expected such as 2G or 500M") from None


def _verify(options: argparse.Namespace) -> int:
    run = open_run(options.store)
    found = verify(run)
    if options.json:
        figures = {name: {"steps": count, "largest": gap} for name, (count, gap) in found.identities.items()}
        print(json.dumps({"chunks": found.chunks, "identities": figures, "failure": found.failure}))
    else:
        print(found)
        if run.capture == "replay":
            print('shares were not stored (capture="replay"): attrib.attribute checks them at every step it visits')
    return 1 if found.failure else 0
