"""Whether a model is the one that was recorded: its tensors by name and shape, buffers and frozen parameters by value."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .constants import Constant, constant_of
from .errors import ModelMismatchError
from .functional import constants_of
from .layout import Layout


class Recorded(Protocol):
    """What a run knows of its model."""

    header: dict[str, Any]
    layout: Layout
    dtype: torch.dtype

    @property
    def digests(self) -> Mapping[str, Constant]: ...

    def constants(self) -> Mapping[str, Tensor]: ...


def check_model(run: Recorded, model: nn.Module, values: bool = True) -> None:
    """Raise ModelMismatchError at the first tensor in which a model differs from the recorded one.

    With `values`, buffers and frozen parameters must hold what they held while recording.
    """
    held = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    expected = dict(zip(run.layout.names, run.layout.shapes, strict=True))
    expected.update({name: known.shape for name, known in run.digests.items()})
    for name, shape in expected.items():
        if name not in held:
            raise ModelMismatchError(
                f"the model is not the recorded one: got no tensor {name!r}, expected one of shape {shape}. "
                f"Build the model as it was when recording ({run.header['model']})."
            )
        if tuple(held[name].shape) != shape:
            raise ModelMismatchError(
                f"the model is not the recorded one: got shape {tuple(held[name].shape)}, expected {shape}, at {name!r}. "
                f"Build the model as it was when recording ({run.header['model']})."
            )
    extra = next((name for name in held if name not in expected), None)
    if extra is not None:
        raise ModelMismatchError(
            f"the model is not the recorded one: got a tensor {extra!r} that the run does not have. "
            f"Build the model as it was when recording ({run.header['model']})."
        )
    if values:
        check_digests(run, constants_of(model, run.layout))


def check_types(run: Recorded, held: Mapping[str, Tensor]) -> None:
    """Raise ModelMismatchError at the first of a model's tensors that is not of the recorded type."""
    types = {name: getattr(torch, known.dtype) for name, known in run.digests.items()}
    for name, dtype in {**dict.fromkeys(run.layout.names, run.dtype), **types}.items():
        if held[name].dtype != dtype:
            convert = f"Convert it with model.to({dtype})." if dtype == run.dtype else "Build it as it was recorded."
            raise ModelMismatchError(
                f"the model is not of the run's type: got {held[name].dtype}, expected {dtype}, at {name!r}. {convert}"
            )


def check_digests(run: Recorded, constants: Mapping[str, Tensor]) -> None:
    """Raise ModelMismatchError at the first of a model's constants that is not the recorded one, in the recorded type.
    Buffers that training changed may hold anything."""
    for name, value in constants.items():
        if name in run.header.get("buffers", ()):
            continue
        known = run.digests[name]
        if constant_of(value.to(getattr(torch, known.dtype))) == known:
            continue
        advice = "Put the recorded values in with run.load(model, step)."
        if name not in run.constants():
            advice = (
                'The run holds its digest only (constants="digest"): build the model on the base it was recorded with.'
            )
        raise ModelMismatchError(
            f"a buffer or frozen parameter is not the recorded one: expected the value it had while recording, at "
            f"{name!r}. {advice}"
        )
