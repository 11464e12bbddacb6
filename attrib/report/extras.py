"""Packages of the extras, brought in when they are first needed."""

from importlib import import_module
from typing import Any

from ..errors import MissingExtraError


def need(module: str, extra: str) -> Any:
    """The module, or a MissingExtraError that says which extra has it."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"a package is not installed: got no {package}, expected it with the extra {extra!r}. "
            f"Install it with: pip install 'attrib[{extra}]'"
        ) from None
