"""What the command line has to know of a user's own script: `my_script:setup`, a function that returns it.

    def setup():
        model = Net()
        return attrib.Setup(model, loss, attrib.measure.log_prob(x_test, y_test), describe=lambda i: texts[i])

A plain tuple (model, loss, measurement) does as well.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import SetupError
from .measure import Measurement


@dataclass(frozen=True)
class Setup:
    """A model, its loss, and what is to be explained.

    Args:
        model: of the recorded architecture; its values do not matter, they are taken from the run.
        loss: as given to `attrib.record`.
        measurement: one, or several by name: {"log_prob": ..., "margin": ...}.
        describe: train example id, a number or a string -> how it is shown: a string, an image, or a pair (image, string).
        describe_query: query -> the same.
        tag: train example id -> class, source or the like.
        groups: as for `attrib.attribute`.

    Example:
        >>> margin = attrib.measure.margin(x_test, y_test)
        >>> setup = attrib.Setup(model, loss, {"log_prob": measurement, "margin": margin})
        >>> setup.choose("margin") is margin
        True
    """

    model: nn.Module
    loss: Callable[..., Tensor] | None
    measurement: Any
    describe: Callable[[Any], Any] | None = None
    describe_query: Callable[[int], Any] | None = None
    tag: Callable[[Any], Any] | None = None
    groups: Mapping[str, Sequence[str]] | None = None

    def choose(self, name: str | None) -> Any:
        """The measurement of that name; of a single one, None is enough.

        Raises:
            SetupError: there is none of that name, or several and no name.
        """
        if not isinstance(self.measurement, Mapping):
            known = getattr(self.measurement, "name", getattr(self.measurement, "__name__", None))
            if name in (None, known):
                return self.measurement
            raise SetupError(f"no such measurement: got {name!r}, expected {known!r}, the only one of the setup.")
        if name is None and len(self.measurement) == 1:
            return next(iter(self.measurement.values()))
        if name not in self.measurement:
            names = ", ".join(map(str, self.measurement))
            raise SetupError(f"no such measurement: got {name!r}, expected one of {names}. Choose with --measurement.")
        return self.measurement[name]


def call(where: str) -> Any:
    """What `module:function` or `path/to/script.py:function` returns.

    Raises:
        SetupError: it cannot be imported or called.
    """
    place, _, name = where.rpartition(":")
    if not place or not name:
        raise SetupError(f"the setup is not named: got {where!r}, expected module:function, such as my_script:setup.")
    try:
        return getattr(_module(place), name)()
    except Exception as error:
        raise SetupError(
            f"the setup failed: got {type(error).__name__}: {error}, at {where}. Call it in Python to see where."
        ) from error


def load_setup(where: str) -> Setup:
    """Call `module:function` or `path/to/script.py:function`; modules are looked for in the working directory too.

    Raises:
        SetupError: it cannot be imported or called, or returns something else than a `Setup` or (model, loss, measurement).
    """
    found = call(where)
    if isinstance(found, tuple) and len(found) == 3:
        found = Setup(*found)
    if not isinstance(found, Setup) or not isinstance(found.model, nn.Module):
        raise SetupError(
            f"the setup returned something else: got {type(found).__name__}, expected (model, loss, measurement) or an "
            f"attrib.Setup, at {where}."
        )
    return found


def select(measurement: Any, queries: Sequence[int] | None) -> Any:
    """The measurement of some of its queries, by position; None for all."""
    if queries is None:
        return measurement
    if isinstance(measurement, Measurement):
        count = len(measurement.batch[0])
        _check(queries, count)
        return measurement.select(queries)

    @wraps(measurement)  # its name and units are asked for
    def chosen(model: Any) -> Tensor:
        values: Tensor = measurement(model)
        _check(queries, len(values))
        return values[list(queries)]

    return chosen


def _check(queries: Sequence[int], count: int) -> None:
    beyond = next((q for q in queries if not 0 <= q < count), None)
    if beyond is not None:
        raise SetupError(f"no such query: got {beyond}, expected 0 to {count - 1}, at --queries.")


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")
        return import_module(place)
    path = Path(place).resolve()
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"there is no script {place}")
    module = module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # where its own imports would find their like
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[path.stem]
        else:
            sys.modules[path.stem] = before
        raise
    return module
