"""The command `attrib`. Errors are one line on stderr, the exit status is 0 only if all is well.

- `runs`: demo, info, plan, verify, attribute
- `replays`: replay
- `counterfactuals`: influence, difference
- `studies`: study
- `results`: report, timeline, top, compare, export
- `shell`: completion
- `options`: what several commands take
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ..errors import AttribError
from . import counterfactuals, replays, results, runs, shell, studies


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:  # said with the usage of the command, where the parser of all has only its own
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        return int(options.call(options))
    except (AttribError, OSError, ValueError, ImportError) as error:
        print(f"attrib: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"attrib: {str(error) or 'interrupted; what was committed can be read'}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attrib", description="Exact training attribution for PyTorch.")
    parser.add_argument("--version", action="version", version=f"attrib {version('attrib')}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is decided on the way")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    runs.add(commands)
    replays.add(commands)
    counterfactuals.add(commands)
    studies.add(commands)
    results.add(commands)
    shell.add(commands, parser)
    return parser
