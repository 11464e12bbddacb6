"""A function of a module, as a pure function of its trainable parameters.

The caller's module comes back as it was: parameters are handed in by name, frozen ones too, and buffers as copies, which a
pass may write to.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .autocast import Autocast, switched_off, under
from .constants import is_low, precision
from .errors import ChangedOutsideError
from .layout import Layout

P = ParamSpec("P")
R = TypeVar("R")


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The module, and what `torch.compile` and DistributedDataParallel wrapped in it, the innermost last."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        yield inner
        parallel = isinstance(inner, nn.parallel.DistributedDataParallel)
        inner = inner.module if parallel else getattr(inner, "_orig_mod", None)


def uncompiled(model: nn.Module) -> nn.Module:
    """The innermost of `wrappers`: it has the names, and can be followed and traced."""
    return list(wrappers(model))[-1]


def compiles() -> bool:
    """Whether torch.compile was asked for anything; a loss may call what was in a way that is not seen."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")  # loaded by torch's optimizers too
    return frames is not None and any(backend is not None for backend in frames.cached_backends.values())


def draws_otherwise() -> bool:
    """Whether what is compiled by torch's default backend draws other random numbers than as it is written."""
    inductor: Any = sys.modules.get("torch._inductor.config")
    return compiles() and inductor is not None and not inductor.fallback_random


@contextmanager
def as_written() -> Iterator[None]:
    """Within it what is compiled (a loss, a layer, `model.compile()`) runs as it is written, and can be traced."""
    dynamo: Any = sys.modules.get("torch._dynamo")  # loaded by whoever compiles
    if dynamo is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"), dynamo.config.patch(error_on_nested_fx_trace=False):
        yield


def constants_of(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Everything in the model's state that training does not move: buffers and frozen parameters."""
    trained = set(layout.names)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach() for name, t in named if name not in trained}


def cast(t: Any, dtype: torch.dtype) -> Any:
    """Floating tensors to `dtype`, all else as it is."""
    return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t


def ordinary(t: Any) -> Any:
    """A tensor made under `torch.inference_mode` as one that can be differentiated through; all else as it is."""
    return t.clone() if isinstance(t, Tensor) and t.is_inference() else t


@contextmanager
def unwarned() -> Iterator[None]:
    """Within it without torch's warning where `torch.vmap` goes through an operation row by row."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        yield


def mapped(
    function: Callable[..., Any], in_dims: Any = 0, chunk_size: int | None = None, randomness: str = "error"
) -> Callable[..., Any]:
    """`torch.vmap`, without that warning."""
    return unwarned()(torch.vmap(function, in_dims=in_dims, chunk_size=chunk_size, randomness=randomness))


@cache
def load_forward_mode() -> None:
    """torch compiles its forward-mode rules at first use, with a deprecated compiler of its own that warns the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


def differentiable(function: Callable[P, R]) -> Callable[P, R]:
    """The function with gradients on and without autocast, whether or not it is called under `torch.no_grad`,
    `torch.inference_mode` or an autocast."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad(), switched_off():
            return function(*args, **kwargs)

    return called


class Widened(TorchFunctionMode):
    """Within it what asks for one of the `narrow` types gets `dtype`: a model whose frozen parts were all of less than
    single precision casts to what they were; others cast to single precision, so as to compute a part in no less."""

    def __init__(self, dtype: torch.dtype, narrow: frozenset[torch.dtype]) -> None:
        super().__init__()
        self._dtype, self._narrow = dtype, narrow

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if CASTS.get(func) in self._narrow:
            return args[0].to(self._dtype)
        return func(*map(self._widen, args), **{n: self._widen(a) for n, a in (kwargs or {}).items()})

    def _widen(self, value: Any) -> Any:
        return self._dtype if isinstance(value, torch.dtype) and value in self._narrow else value


LOW = frozenset(t for t in vars(torch).values() if isinstance(t, torch.dtype) and is_low(t))
CASTS = {Tensor.bfloat16: torch.bfloat16, Tensor.half: torch.float16, Tensor.float: torch.float32}


class Roundings(TorchFunctionMode):
    """Notes the types that parameters are carried on in while it is active: by an autocast inside, by casts, by parts of
    that type. Data and constants, which nothing is differentiated by, are what they are in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()
        self.heard: set[Any] = set()  # the kinds of arguments that passes were heard of

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.requires_grad:
                self.types.add(t.dtype.to_real())
        return out


class Functional:
    """`function(model, *args)` with the model's state given: `f(parameters, *args)`.

    Args:
        model: used in the mode it is in, left as it is.
        function: called with the model and `args`.
        layout: names of the trained parameters.
        dtype: type that floating `args` are cast to, and buffers and frozen parameters where the trained parameters are of
            another one. Where they are of this one, what is of lower precision (a frozen base in bfloat16) is left to the
            model, which casts as it does in training. Where it is itself less than single precision the parameters that are
            handed in may be of more: the model gets them rounded, and their gradients come back in their own type.
        autocast: what the function is called under, none but this.
        double: whether, where `dtype` is double precision, all of it is: what casts to single precision on its way (norms,
            rotary positions, softmax in many models, so as to compute them in no less) does not.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any],
        layout: Layout,
        dtype: torch.dtype,
        autocast: Autocast | None = None,
        double: bool = False,
    ) -> None:
        self.layout, self.dtype, self._autocast, self._roundings = layout, dtype, autocast, Roundings()
        self._model, self._function = model, function
        self._compiled = any(
            m._compiled_call_impl is not None or uncompiled(m) is not m for m in model.modules()
        )  # some part of it
        self._factor = 1.0
        own = {name: t.dtype for name, t in model.named_parameters()}
        self._as_trained = own[layout.names[0]] == dtype
        constants = constants_of(model, layout).items()
        types = {own[layout.names[0]], *(t.dtype for _, t in constants)}
        low = not self._as_trained and any(map(is_low, types))
        single = double and dtype == torch.float64
        self._narrow = (LOW if low else frozenset()) | (frozenset([torch.float32]) if single else frozenset())
        cast_ones = {n: t if self._as_trained else cast(t, dtype) for n, t in constants}
        # frozen parameters may be large, and no model writes to them; should one, it is noticed
        self._constants = {n: t if n in own else t.clone() for n, t in cast_ones.items()}
        self._frozen = [n for n in self._constants if n in own]
        self.buffers: dict[str, Tensor] = {}  # those that `holding` was given
        # where buffers stand, and what they are to hold, of each `bound` that is open
        self._held: list[list[tuple[dict[str, Any], str, Tensor]]] = []
        self._versions = self._now()

    def __call__(self, parameters: Mapping[str, Tensor], *args: Any) -> Any:
        with self.bound(parameters):
            return self.run(*args)

    @property
    def model(self) -> nn.Module:
        """The one that it was made with."""
        return self._model

    @property
    def precision(self) -> torch.dtype:
        """What it rounds to on its way: the compute type, or that of a part in less than single precision, of an autocast,
        or of fewer bits that it casts to (float32 in float64: norms, softmax). What it does by itself is known from its
        first call on."""
        types = {*(t.dtype for t in self._constants.values() if is_low(t.dtype)), *self._roundings.types}
        autocast = self._autocast
        return precision(types | {autocast.dtype} if autocast and autocast.rounds(self.dtype) else types, self.dtype)

    @property
    def coarse(self) -> bool:
        """Whether that is less than single precision."""
        return is_low(self.precision)

    def times(self, factor: float) -> "Functional":
        """The function times a number."""
        other = copy(self)
        other._factor = factor
        return other

    def holding(self, buffers: Mapping[str, Tensor]) -> "Functional":
        """The function of a model that holds these buffers, by name: those of the step it is evaluated at."""
        if not buffers:
            return self
        other = copy(self)
        other.buffers = {n: t if self._as_trained else cast(t, self.dtype) for n, t in buffers.items()}
        return other

    def cast(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Floating tensors in the compute type; where that is the model's own, what is low comes as it does in training."""

        def one(t: Tensor) -> Tensor:
            same = self._as_trained and (is_low(t.dtype) or is_low(self.dtype))
            return t if same else cast(t, self.dtype)

        return tree_map_only(Tensor, one, args)

    def run(self, *args: Any) -> Any:
        """The function with the model as it is: within `bound`. Its buffers are copies, so that whoever writes to them
        (running statistics) writes into nothing, and the next call finds them as this one did."""
        args = self.cast(args)
        fresh = {id(t): t.clone() for _, _, t in self._held[-1]}  # one tensor may stand in two places
        for named, name, t in self._held[-1]:
            named[name] = fresh[id(t)]
        eager = as_written() if self._compiled or compiles() else nullcontext()
        with (
            eager,
            under(self._autocast, self._model),
            Widened(self.dtype, self._narrow) if self._narrow else nullcontext(),
            self._listening(args),
        ):
            values = self._function(self._model, *args)
        return values if self._factor == 1.0 else values * self._factor

    def _listening(self, args: tuple[Any, ...]) -> AbstractContextManager[Any]:
        """Of the first pass with arguments of a kind, what it rounds to is noted."""
        kind = tuple((a.dim(), a.dtype) if isinstance(a, Tensor) else type(a) for a in args)
        if kind in self._roundings.heard or not torch.is_grad_enabled():
            return nullcontext()
        self._roundings.heard.add(kind)
        return self._roundings

    @contextmanager
    def bound(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Within it the model holds the given parameters, so that a backward pass that runs parts of it again (activation
        checkpointing) runs them with these. buffers: in the place of those that the function holds. Yields the very
        parameters that the model holds."""
        self._versions = self._now()
        trained = {n: t.to(self.dtype) if is_low(self.dtype) else t for n, t in parameters.items()}
        given = {**self._constants, **self.buffers, **(buffers or {}), **trained}
        held = {
            id(t): given[n] for n, t in (*self._model.named_parameters(), *self._model.named_buffers()) if n in given
        }
        written = {id(t) for _, t in self._model.named_buffers()}
        swapped = []
        for module in self._model.modules():
            for named in (module._parameters, module._buffers):
                tensors: dict[str, Any] = named
                for name, t in tensors.items():
                    if t is not None and id(t) in held:
                        swapped.append((tensors, name, t))
        for tensors, name, t in swapped:
            tensors[name] = held[id(t)]
        self._held.append([(tensors, name, tensors[name]) for tensors, name, t in swapped if id(t) in written])
        try:
            yield trained
        finally:
            self._held.pop()
            for tensors, name, t in swapped:
                tensors[name] = t

    def _now(self) -> dict[str, int]:
        return {name: self._constants[name]._version for name in self._frozen}

    def check_constants(self) -> None:
        """Raise ChangedOutsideError if a call wrote to a frozen parameter: then it is not a function of the others."""
        for name, version in self._versions.items():
            if self._constants[name]._version != version:
                raise ChangedOutsideError(
                    f"a frozen parameter changes when the model runs: got a write to {name!r}, expected none. Make it a "
                    f"buffer of its module (register_buffer), which may be written to."
                )


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever is written to the model's buffers within it, they are what they were behind it."""
    held = [(module._buffers, name, t) for module in model.modules() for name, t in module._buffers.items()]
    for named, name, t in held:
        named[name] = None if t is None else t.clone()
    try:
        yield
    finally:
        for named, name, t in held:
            named[name] = t


@contextmanager
def training_modes(model: nn.Module, training: Sequence[str]) -> Iterator[None]:
    """Put exactly the named modules into training mode, for the time of the context."""
    before = {module: module.training for module in model.modules()}
    names = set(training)
    for name, module in model.named_modules():
        module.training = name in names
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
