"""The arguments of `attrib.record` and `recorder.step`: what is wrong with them is said before anything is written."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BatchError, BatchIdentityError, LossError
from ..layout import Layout

CAPTURES = ("replay", "gradients", "factors")
CONSTANTS = ("values", "digest")  # what is stored of them
REMAINDERS = ("refuse", "account")  # what becomes of what p.grad holds beyond the shares


def check_options(capture: str, constants: str = "values", remainder: str = "refuse", **counts: int | None) -> None:
    words = {"capture": (capture, CAPTURES), "constants": (constants, CONSTANTS), "remainder": (remainder, REMAINDERS)}
    for name, (word, known) in words.items():
        if word not in known:
            raise ValueError(f"unknown {name}: got {word!r}, expected one of {', '.join(map(repr, known))}.")
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is not a count: got {value!r}, expected an integer of at least 1.")


def names_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[str, ...]:
    """Names of the optimizer's parameters, in its order."""
    known = {id(p): name for name, p in model.named_parameters()}
    names = []
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in known:
                raise ValueError(
                    f"the optimizer moves a tensor that is no parameter of the model: got shape {tuple(p.shape)}, expected "
                    f"one of model.named_parameters(), at param group {number}. Pass the model that holds it."
                )
            names.append(known[id(p)])
            first = optimizer.param_groups[0]["params"][0]
            if p.dtype != first.dtype or p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"parameters must share one type: got {p.dtype}, expected float32 or float64 throughout, at "
                    f"{names[-1]!r}. Convert the model with model.to(torch.float32)."
                )
    return tuple(names)


def check_batch(
    index: Any, batch: tuple[Any, ...], before: np.dtype[Any] | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids as `check_ids` has them, of the type of those `before`, and the batch as arrays."""
    ids = check_ids(index)
    if before is not None and ids.dtype != before:
        now, then = ("strings", "numbers") if ids.dtype == object else ("numbers", "strings")
        raise BatchError(
            f"the ids are of another kind: got {now}, expected {then} as in the steps before, at the index. Call every "
            f"example of a run by a number, or every one by a string."
        )
    if not batch:
        raise BatchError("the batch is missing: got no tensors, expected step(index, *batch) as given to the loss.")
    rows = []
    for j, value in enumerate(batch):
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise BatchError(
                f"a part of the batch is no batched tensor: got {type(value).__name__}, expected a tensor with "
                f"{len(ids)} rows, at argument {j} after the index."
            )
        if len(value) != len(ids):
            raise BatchError(
                f"index and batch differ in length: got {len(ids)} ids and {len(value)} rows, expected as many, at "
                f"argument {j} after the index."
            )
        try:
            rows.append(value.detach().cpu().numpy())
        except TypeError:
            raise BatchError(
                f"a part of the batch cannot be stored: got {value.dtype}, expected a type that numpy has, at argument "
                f"{j} after the index. Convert it in the training loop, e.g. to float32."
            ) from None
    return ids, rows


def check_ids(index: Any) -> np.ndarray:
    """(B,) ids of training examples, a copy: int64, or objects that are strings, whatever they came in."""
    ids = index.detach().cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
    if ids.ndim != 1 or len(ids) == 0:
        raise BatchError(f"index is not a list of ids: got shape {ids.shape}, expected (B,) with B of at least 1.")
    if ids.dtype.kind in "UOST":  # of the list itself, since numpy makes strings of the numbers in it and cuts NULs off
        return _strings(np.array(ids if isinstance(index, np.ndarray) else list(index), dtype=object))
    if not np.issubdtype(ids.dtype, np.integer):
        raise BatchError(
            f"index is not integer: got {ids.dtype}, expected int64 ids of the training examples, or strings."
        )
    if ids.dtype == np.uint64 and (ids > np.iinfo(np.int64).max).any():
        raise BatchError(f"an id is too large: got {ids.max()}, expected at most 2**63 - 1, at slot {ids.argmax()}.")
    if (ids < 0).any():
        raise BatchError(f"an id is negative: got {ids.min()}, expected ids of 0 or more, at slot {ids.argmin()}.")
    return ids.astype(np.int64)


def _strings(ids: np.ndarray) -> np.ndarray:
    for slot, name in enumerate(ids):
        if not isinstance(name, str):
            hint = " Decode it: name.decode()." if isinstance(name, bytes) else ""
            raise BatchError(
                f"an id is no string: got {name!r} of type {type(name).__name__}, expected strings, or an array of integers "
                f"from 0 to 2**63 - 1, at slot {slot}.{hint}"
            )
        try:
            cut = b"\0" in name.encode()
        except UnicodeEncodeError:
            raise BatchError(
                f"an id is no text: got {name!r}, expected characters that UTF-8 has, at slot {slot}. Replace half a "
                f"surrogate pair, as name.encode(errors='replace').decode() does."
            ) from None
        if cut:
            raise BatchError(
                f"an id holds a NUL: got {name!r}, expected none, since numpy and pandas end strings there, at slot {slot}."
            )
    return ids


def check_gradient(layout: Layout, parameters: Sequence[Tensor], step: int) -> Tensor:
    """p.grad of all parameters as a vector (P,), zeros where there is none.

    Raises:
        BatchIdentityError: no parameter has a gradient. LossError: a gradient is not finite.
    """
    if all(p.grad is None for p in parameters):
        raise BatchIdentityError(
            "no parameter has a gradient: got p.grad None everywhere, expected loss(...).backward() before step."
        )
    for name, p in zip(layout.names, parameters, strict=True):
        if p.grad is not None and p.grad.is_sparse:
            raise BatchIdentityError(
                f"a gradient is sparse, expected a dense one, at parameter {name!r}, step {step}. Build the embedding with "
                f"sparse=False. The step was refused."
            )
    gradient = layout.flatten(p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters)
    if (
        not torch.isfinite(gradient.sum()) and not torch.isfinite(gradient).all()
    ):  # a sum is read faster, and may overflow
        bad = next(n for n, part in layout.slices() if not torch.isfinite(gradient[part]).all())
        raise LossError(
            f"the gradient is not finite, expected finite numbers, at parameter {bad!r}, step {step}. "
            f"The step was refused; parameters and store are as they were."
        )
    return gradient
