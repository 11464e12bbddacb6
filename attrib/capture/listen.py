"""What is heard of the user's own passes between two steps, through hooks on the model and its parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..autocast import DEVICES, Autocast, current
from ..checks import NormWatch, RandomWatch, ReducedNormWatch, check_alone
from ..functional import wrappers
from ..generators import generators
from ..gradients import Watch
from ..gradients.assignment import Trace


@dataclass(frozen=True)
class Heard:
    """clip: the factor on all gradients since the backward pass. passes: how many went forward, of the loop's own; forwards:
    of each announced batch. before, behind: the state of the generators around the last of them, None where none was heard.
    firsts: the state before the first forward pass of each announced batch. start: `before`, or the state now. sites: of
    the one pass, with the gradients of their outputs; None where it was not followed. norms (K,): of the gradients as the
    last backward pass left them, None where there may be no remainder; change: of their norm since. autocasts: what the
    passes ran under, each once, the last one first; surrounded: whether one is on still, at the step."""

    clip: float
    passes: int
    forwards: tuple[int, ...]
    before: Tensor | None
    behind: Tensor | None
    firsts: tuple[Tensor | None, ...]
    start: Tensor
    sites: tuple[Trace, list[Tensor | None]] | None
    norms: Tensor | None
    change: float
    autocasts: tuple[Autocast | None, ...]
    surrounded: bool

    def beside(self, others: "Sequence[Heard]") -> "Heard":
        """What other processes heard of their batches of the same step behind it; the gradients are the same in all."""
        if not others:
            return self
        every = (self, *others)
        known = all(heard.forwards for heard in every)
        return replace(
            self,
            passes=sum(heard.passes for heard in every),
            forwards=sum((heard.forwards for heard in every), ()) if known else (),
            firsts=sum((heard.firsts for heard in every), ()) if known else (),
            sites=None,
            autocasts=tuple(dict.fromkeys(on for heard in every for on in heard.autocasts)),
        )


class Listeners:
    """All hooks of a recorded run. sites: whether the calls of a pass are followed. accounts: whether gradients may hold
    more than the shares."""

    def __init__(
        self, model: nn.Module, names: Sequence[str], parameters: Sequence[Tensor], sites: bool, accounts: bool = False
    ) -> None:
        layers = list(wrappers(model))
        parallel = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in layers)
        self._accounts = accounts
        self._norms = (ReducedNormWatch if parallel else NormWatch)(parameters, accounts)
        self._random = RandomWatch(model)
        self._alone = None if parallel else model.register_forward_pre_hook(check_alone)
        sites = (
            sites and len(layers) == 1
        )  # what is compiled is not followed call by call, of many processes there are more
        self._watch = Watch(model, dict(zip(names, parameters, strict=True))) if sites else None

    @property
    def pulled(self) -> bool:
        """Whether a backward pass was heard since `clear`."""
        return self._norms.heard

    @property
    def finite(self) -> bool:
        """Whether the gradients are that the last backward pass left."""
        return self._norms.finite

    @property
    def backwards(self) -> int:
        """How often a gradient came since the beginning."""
        return self._norms.gradients

    def announce(self) -> None:
        """The forward passes that follow are of another batch."""
        self._random.announce()

    def forget_skipped(self) -> list[int]:
        """The numbers of the announced batches that no backward pass came of; they are forgotten."""
        return self._random.forget_skipped()

    def heard(self, size: int, announced: int) -> Heard:
        """Since `clear`, of so many examples in a batch, and announced batches.

        Raises:
            BatchIdentityError: the gradients were changed by different factors, and that is not accounted for.
        """
        random, batches = self._random, self._random.of_batches()
        return Heard(
            clip=self._norms.clipping(),
            passes=len(random.calls),
            forwards=tuple(map(len, batches)),
            before=random.before,
            behind=random.behind,
            firsts=tuple(states[0] if states else None for states in batches),
            start=random.before if random.before is not None else generators(),
            sites=None if self._watch is None or announced > 1 else self._watch.seen(size),
            norms=self._norms.left() if self._accounts else None,
            change=self._norms.change() if self._accounts else 1.0,
            autocasts=random.autocasts,
            surrounded=any(map(current, DEVICES)),
        )

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
        """Forget the passes: the step is recorded, or it never was made."""
        self._norms.clear()
        self._random.clear()
        if self._watch is not None:
            self._watch.clear()

    def zeroed(self, left: int) -> None:
        """The gradients are gone, and with them their passes; not those of which no gradient came yet, of so many announced
        batches that are left."""
        if self._norms.heard:
            self._random.clear(keep=left)
        self._norms.clear()
        if self._watch is not None:
            self._watch.clear()

    def remove(self) -> None:
        """Take off all hooks."""
        for hooked in (self._random, self._norms, self._watch, self._alone):
            if hooked is not None:
                hooked.remove()
