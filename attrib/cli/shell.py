"""The command completion: what a shell completes the others by."""

import argparse
from typing import Any

from ..report.extras import need
from .options import command

SHELLS = ("bash", "zsh", "tcsh")
WHERE = """The script goes where your shell looks for it, such as:
  attrib completion bash > ~/.local/share/bash-completion/completions/attrib
  attrib completion zsh > ~/.zfunc/_attrib    # with ~/.zfunc in fpath"""


def add(commands: Any, whole: argparse.ArgumentParser) -> None:
    """whole: the parser of all commands."""
    made = command(commands, "completion", _completion, "print a script that completes commands in a shell", json=False)
    made.formatter_class, made.epilog = argparse.RawDescriptionHelpFormatter, WHERE
    made.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    made.set_defaults(whole=whole)


def _completion(options: argparse.Namespace) -> int:
    print(need("shtab", "shell").complete(options.whole, shell=options.shell))
    return 0
