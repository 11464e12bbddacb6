"""The command study: recipes that train, explain and intervene, and write a page."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from ..report import to_json
from .options import command, positive

NAMES = (
    "grokking",
    "deep_linear",
    "opposing_signals",
    "development",
    "counterfactual",
)  # modules of attrib.studies, each with `study`


def add(commands: Any) -> None:
    made = command(commands, "study", _study, "train, explain and intervene, and write a page of what was found")
    made.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    made.add_argument("--setting", default="quick", help="quick or toy; of grokking also explaind (an hour)")
    made.add_argument("--seeds", type=positive, metavar="N", help="how many; by default as the setting has it")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="(study-NAME-SETTING); a study goes on where it was")


def _study(options: argparse.Namespace) -> int:
    study = import_module(f"..studies.{options.name}", __package__).study
    folder = options.out or Path(f"study-{options.name}-{options.setting}")
    say = (lambda text: None) if options.json else print
    page = study(folder, options.setting, options.seeds, say)
    if options.json:
        print(to_json({"page": str(page)}))
    return 0
