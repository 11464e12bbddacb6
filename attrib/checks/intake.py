"""The arguments of `attrib.record` and `recorder.step`: what is wrong with them is said before anything is written."""

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Batch, Shared, leaves_of, places, plain
from ..errors import BatchError, BatchIdentityError, LossError
from ..functional import ordinary
from ..inputs import Inputs, inputs_of
from ..layout import Layout

CAPTURES = ("replay", "gradients", "factors")
CONSTANTS = ("values", "digest")  # what is stored of them
REMAINDERS = ("refuse", "account")  # what becomes of what p.grad holds beyond the shares
SHARES = ("example", "rows")  # what a share is


TRAINED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # types of parameters


def _listed(types: Sequence[torch.dtype]) -> str:
    return " or ".join(str(t).removeprefix("torch.") for t in types)


def check_options(
    capture: str, constants: str = "values", remainder: str = "refuse", shares: str = "example", **counts: int | None
) -> None:
    words = {"capture": (capture, CAPTURES), "constants": (constants, CONSTANTS), "remainder": (remainder, REMAINDERS)}
    words |= {"shares": (shares, SHARES)}
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
            if p.dtype != first.dtype or p.dtype not in TRAINED:
                raise ValueError(
                    f"parameters must share one type: got {p.dtype}, expected {_listed(TRAINED)}, and the same throughout, "
                    f"at {names[-1]!r}. Convert the model with model.to(torch.float32)."
                )
    return tuple(names)


def check_batch(index: Any, args: tuple[Any, ...], before: np.dtype[Any] | None = None) -> tuple[np.ndarray, Batch]:
    """Ids as `check_ids` has them, of the type of those `before`, and the batch."""
    ids = check_ids(index)
    if before is not None and ids.dtype != before:
        now, then = ("strings", "numbers") if ids.dtype == object else ("numbers", "strings")
        raise BatchError(
            f"the ids are of another kind: got {now}, expected {then} as in the steps before, at the index. Call every "
            f"example of a run by a number, or every one by a string."
        )
    if not args:
        raise BatchError(
            "the batch is missing: got no tensors, expected step(index, *batch), or batch(index, *batch) before the forward "
            "pass, as given to the loss."
        )
    try:
        batch = Batch.of(args, len(ids))
    except TypeError as error:
        got, where = error.args
        raise BatchError(
            f"a part of the batch cannot be stored: got {got}, expected tensors with {len(ids)} rows, numbers, texts or "
            f"None, in dicts with keys that are texts, lists and tuples, at {where} after the index. Convert it in the "
            f"training loop, as torch.as_tensor does arrays, dict() and tuple() do other trees."
        ) from None
    _check_rows(batch, args)
    return ids, batch.map(ordinary) if any(t.is_inference() for t in batch.tensors) else batch


def _check_rows(batch: Batch, args: tuple[Any, ...]) -> None:
    """Raise BatchError where a tensor has neither a row per example, nor one for all, nor was said to be shared."""
    if batch.rows and all(batch.rows):
        return
    said = [isinstance(leaf, Shared) for leaf in leaves_of(args)]
    for leaf, rows, known, where in zip(batch.leaves, batch.rows, said, places(batch.tree), strict=True):
        if isinstance(leaf, Tensor) and not rows and not known and leaf.dim() and len(leaf) != 1:
            raise BatchError(
                f"index and batch differ in length: got {batch.size} ids and {len(leaf)} rows, expected as many, at {where} "
                f"after the index. Where all examples share the tensor, say so: attrib.shared(tensor)."
            )
    if not any(batch.rows):
        raise BatchError(
            f"the batch has no rows: got no tensor with a row for each of the {batch.size} ids, expected one at least. Give "
            f"the examples, such as their index as a tensor, beside what they share."
        )


def hold(batch: Batch, before: tuple[Batch, Inputs] | None) -> tuple[Batch, Inputs]:
    """Copies, since the caller may fill the same tensors again; of a batch that comes again, those made `before`.

    Raises:
        BatchError: a tensor does not hold plain numbers.
    """
    if before is not None and _same(batch, before[0]):
        return before
    try:
        batch = batch.map(lambda t: t.detach().clone())
        return batch, inputs_of(batch)
    except TypeError as error:
        got, where = error.args
        raise BatchError(
            f"a part of the batch cannot be stored: got {got}, expected plain numbers, at {where} after the index. Convert "
            f"it in the training loop, e.g. with t.to_dense()."
        ) from error


def _same(a: Batch, b: Batch) -> bool:
    if a.kind != b.kind or a.size != b.size or a.numbers != b.numbers:
        return False
    each = zip(a.tensors, b.tensors, strict=True)
    return all((s.device, s.layout, s.shape) == (t.device, t.layout, t.shape) and torch.equal(s, t) for s, t in each)


def check_forwards(
    heard: Sequence[int], batches: Sequence[Batch], usual: Mapping[str, int | None], step: int
) -> dict[str, int | None]:
    """How many forward passes follow an announced batch, by its tree: as many as `usual`; None where that differed.

    Raises:
        BatchError: an announcement is missing, or was made twice.
    """
    known = dict(usual)
    for n, (count, batch) in enumerate(zip(heard, batches, strict=False)):
        tree = json.dumps(plain(batch.tree))
        expected = known.setdefault(tree, count)
        if expected is None or count == expected:
            continue
        if tree not in usual:  # of the first step with such batches
            known[tree] = None
            continue
        what = "an announcement is missing" if count > expected else "a batch was announced, and no pass of it was made"
        raise BatchError(
            f"{what}: got {count} forward passes of the model after batch {n + 1} of {len(heard)}, expected {expected} as "
            f"before, at step {step}. Call recorder.batch(index, *batch) once before the forward pass of each batch. The "
            f"step was refused."
        )
    return known


def check_ids(index: Any) -> np.ndarray:
    """(B,) ids of training examples, a copy: int64, or objects that are strings, whatever they came in."""
    ids = index.detach().cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
    if ids.ndim != 1 or len(ids) == 0:
        raise BatchError(f"index is not a list of ids: got shape {ids.shape}, expected (B,) with B of at least 1.")
    if ids.dtype.kind in "UOST":  # of the list itself, since numpy makes strings of the numbers in it and cuts NULs off
        return _strings(np.array(ids if isinstance(index, np.ndarray) else list(index), dtype=object))
    if ids.dtype.kind not in "iu":
        raise BatchError(
            f"index is not integer: got {ids.dtype}, expected int64 ids of the training examples, or strings."
        )
    if ids.dtype == np.uint64 and (ids > np.iinfo(np.int64).max).any():
        raise BatchError(f"an id is too large: got {ids.max()}, expected at most 2**63 - 1, at slot {ids.argmax()}.")
    if ids.min() < 0:
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
    grads = [p.grad for p in parameters]
    if all(g is None for g in grads):
        raise BatchIdentityError(
            "no parameter has a gradient: got p.grad None everywhere, expected loss(...).backward() before step."
        )
    for name, g in zip(layout.names, grads, strict=True):
        if g is not None and g.is_sparse:
            raise BatchIdentityError(
                f"a gradient is sparse, expected a dense one, at parameter {name!r}, step {step}. Build the embedding with "
                f"sparse=False. The step was refused."
            )
    gradient = layout.flatten(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True))
    # a sum is read faster, and may overflow
    if not isfinite(gradient.sum().item()) and not torch.isfinite(gradient).all():
        bad = next(n for n, part in layout.slices() if not torch.isfinite(gradient[part]).all())
        raise LossError(
            f"the gradient is not finite, expected finite numbers, at parameter {bad!r}, step {step}. "
            f"The step was refused; parameters and store are as they were."
        )
    return gradient
