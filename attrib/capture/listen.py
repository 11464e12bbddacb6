"""What is heard of the user's own passes between two steps, through hooks on the model and its parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..autocast import DEVICES, Autocast, current
from ..checks import NormWatch, RandomWatch
from ..functional import uncompiled
from ..generators import generators
from ..gradients import Watch
from ..gradients.assignment import Trace


@dataclass(frozen=True)
class Heard:
    """clip: the factor on all gradients since the backward pass. passes: how many went forward. before, behind: the state of
    the generators around the last of them, None where none was heard. start: `before`, or the state now. sites: of the one
    pass, with the gradients of their outputs; None where it was not followed. compiled: whether the model is. autocasts:
    what the passes ran under, each once, the last one first; surrounded: whether one is on still, at the step."""

    clip: float
    passes: int
    before: Tensor | None
    behind: Tensor | None
    start: Tensor
    sites: tuple[Trace, list[Tensor | None]] | None
    compiled: bool
    autocasts: tuple[Autocast | None, ...] = ()
    surrounded: bool = False


class Listeners:
    """All hooks of a recorded run. sites: whether the calls of a pass are followed."""

    def __init__(self, model: nn.Module, names: Sequence[str], parameters: Sequence[Tensor], sites: bool) -> None:
        self._compiled = uncompiled(model) is not model
        self._norms = NormWatch(parameters)
        self._random = RandomWatch(model)
        sites = sites and not self._compiled  # what is compiled is not followed call by call
        self._watch = Watch(model, dict(zip(names, parameters, strict=True))) if sites else None

    def heard(self, size: int) -> Heard:
        """Since `clear`, of a batch of so many examples.

        Raises:
            BatchIdentityError: the gradients were changed by different factors.
        """
        random = self._random
        start = random.before if random.before is not None else generators()
        sites = None if self._watch is None else self._watch.seen(size)
        clip, compiled, on = self._norms.clipping(), self._compiled, any(map(current, DEVICES))
        return Heard(clip, random.passes, random.before, random.behind, start, sites, compiled, random.autocasts, on)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """While the recorder runs the model itself."""
        hooked = [h for h in (self._random, self._watch) if h is not None]
        for h in hooked:
            h.busy = True
        try:
            yield
        finally:
            for h in hooked:
                h.busy = False

    def clear(self) -> None:
        """Forget the passes: their gradients are gone, or the step is recorded."""
        self._norms.clear()
        self._random.clear()
        if self._watch is not None:
            self._watch.clear()

    def remove(self) -> None:
        """Take off all hooks."""
        for hooked in (self._random, self._norms, self._watch):
            if hooked is not None:
                hooked.remove()
