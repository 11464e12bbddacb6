"""The documentation: `./scripts/docs` builds it, warnings are errors."""

import re
from importlib.metadata import version as installed_version
from typing import Any

project = "attrib"
author = "the authors of attrib"
project_copyright = author
release = version = installed_version("attrib")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = "attrib"
html_static_path: list[str] = []
html_theme_options = {
    "navbar_persistent": [],  # the side has a search already
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
# a notebook is stored as it ran, and run again by the tests: `./scripts/docs -D nb_execution_mode=force` runs it here
nb_execution_mode = "off"
nb_execution_timeout = 600

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
intersphinx_mapping: dict[str, Any] = {}  # links go to our own pages: no network is needed to build them

LITERAL = re.compile(r"(``[^`]*``|`[^`]*`)")


def escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written for people at a prompt: bars and stars in them are bars and stars, not markup."""
    for n, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "...")):
            continue
        parts = LITERAL.split(line)
        parts[::2] = [re.sub(r"(?<!\\)([|*])", r"\\\1", part) for part in parts[::2]]
        lines[n] = "".join(parts)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape, priority=100)  # before napoleon adds markup of its own
