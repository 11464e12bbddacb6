"""The command `attrib`: demo, info, verify. Errors are one line on stderr; the exit status is 0 only if all is well."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from .errors import AttribError
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
    return parser


def _demo(options: argparse.Namespace) -> int:
    from .studies.demo import demo  # brings matplotlib along

    demo(options.out, options.seed)
    return 0


def _info(options: argparse.Namespace) -> int:
    run = open_run(options.store)
    print(json.dumps(run.header, indent=2) if options.json else text.describe_run(run))
    return 0


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
