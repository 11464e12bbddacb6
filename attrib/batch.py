"""A batch as a loss is given it: a tree of tensors, numbers, texts and None; which tensors have a row per example.

Trees are dicts, lists and tuples. A tensor whose first dimension is the number of examples has their rows; what all examples
share is said by `shared`, or seen: a tensor of no dimension, or of one row where there are several examples. Should a shared
tensor be as long as the batch by accident it counts as rows. That changes no share: a batch is worked through whole unless
its parts were seen to have the same losses by themselves; but it is cut with the batch where a replay drops examples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

Tree = tuple[Any, ...]  # ("leaf", number), ("value", text or None), or ("dict" | "list" | "tuple", parts)

NUMBERS = (bool, int, float)


@dataclass(frozen=True)
class Shared:
    """A tensor of a batch that all of its examples share."""

    tensor: Tensor


def shared(tensor: Tensor) -> Shared:
    """Say that all examples of a batch share a tensor, as they do class weights, whatever its length.

    Args:
        tensor: of any shape; the loss is given it as it is. Without this, one that is as long as the batch counts as a row
            per example.

    Returns:
        What stands in its place in `recorder.batch` or `recorder.step`, alone or within the batch's dicts and lists.

    Example:
        >>> def weighted(model, x, y, weights):
        ...     return nn.functional.cross_entropy(model(x), y, weights, reduction="none")
        >>> weights = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
        >>> with attrib.record(optimizer, model, weighted, "new.zarr") as recorder:
        ...     for index, x, y in loader:
        ...         recorder.zero_grad()
        ...         recorder.batch(index, x, y, attrib.shared(weights))
        ...         weighted(model, x, y, weights).mean().backward()
        ...         recorder.step()
        >>> attrib.open_run("new.zarr").batch(0)[-1]
        tensor([1., 2., 1.], dtype=torch.float64)
    """
    return Shared(tensor)


@dataclass(frozen=True, eq=False)
class Batch:
    """size: examples. leaves: tensors and numbers, in the order of the tree. rows: whether each has one per example."""

    size: int
    leaves: tuple[Any, ...]
    rows: tuple[bool, ...]
    tree: Tree

    @classmethod
    def of(cls, args: "Sequence[Any] | Batch", size: int | None = None) -> "Batch":
        """From what a loss takes after the model. size: None for the length of the first tensor.

        Raises:
            TypeError: a leaf of another type, or a key of a dict that is no text. Its arguments: what, and where.
        """
        if isinstance(args, Batch):
            return args
        leaves: list[Any] = []
        tree = _tree(tuple(args), leaves, "argument ")
        if size is None:
            size = next((len(t) for t in leaves if isinstance(t, Tensor) and t.dim()), 0)
        rows = tuple(isinstance(t, Tensor) and t.dim() > 0 and len(t) == size for t in leaves)
        return cls(size, tuple(t.tensor if isinstance(t, Shared) else t for t in leaves), rows, tree)

    @property
    def args(self) -> tuple[Any, ...]:
        """What the loss takes after the model."""
        return tuple(_grown(self.tree, self.leaves))

    @property
    def said(self) -> tuple[Any, ...]:
        """`args`, in which what is shared says so: `Batch.of` makes the same of it again."""
        each = zip(self.leaves, self.rows, strict=True)
        leaves = [shared(t) if isinstance(t, Tensor) and not rows else t for t, rows in each]
        return tuple(_grown(self.tree, leaves))

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in self.leaves if isinstance(t, Tensor)]

    @property
    def data(self) -> list[Tensor]:
        """Those with a row per example."""
        return [t for t, rows in zip(self.leaves, self.rows, strict=True) if rows]

    @property
    def numbers(self) -> tuple[Any, ...]:
        return tuple(n for n in self.leaves if not isinstance(n, Tensor))

    @property
    def kind(self) -> tuple[Any, ...]:
        """What batches that are worked through alike have in common."""
        leaves = ((t.dim(), t.dtype) if isinstance(t, Tensor) else _kind(t) for t in self.leaves)
        return self.tree, self.rows, tuple(leaves)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """With every tensor replaced."""
        return self.with_tensors(map(function, self.tensors))

    def with_tensors(self, tensors: Iterator[Tensor] | Sequence[Tensor]) -> "Batch":
        """With other tensors in the places of its own."""
        new = iter(tensors)
        return replace(self, leaves=tuple(next(new) if isinstance(t, Tensor) else t for t in self.leaves))

    def take(self, examples: "slice | Tensor") -> "Batch":
        """Some of the examples."""
        leaves = zip(self.leaves, self.rows, strict=True)
        taken = tuple(t[_on(examples, t)] if rows else t for t, rows in leaves)
        size = len(range(self.size)[examples]) if isinstance(examples, slice) else len(examples)
        return replace(self, size=size, leaves=taken)

    def cut(self, most: int) -> "Iterator[tuple[Batch, int]]":
        """In slices of one size, of `most` examples or fewer; so the last may begin with examples seen already: how many."""
        length = -(-self.size // -(-self.size // max(1, most)))
        for lo in range(0, self.size, length):
            at = min(lo, self.size - length)
            yield self.take(slice(at, at + length)), lo - at


def leaves_of(args: Sequence[Any]) -> list[Any]:
    """Those of a tree, those that are said to be shared as they were."""
    leaves: list[Any] = []
    _tree(tuple(args), leaves, "argument ")
    return leaves


def _on(examples: "slice | Tensor", t: Tensor) -> "slice | Tensor":
    return examples.to(t.device) if isinstance(examples, Tensor) else examples


def _kind(number: Any) -> Any:
    """A float may anneal; by an integer or a flag a loss may go another way."""
    return float if isinstance(number, float) else (type(number), number)  # True is 1


def _tree(part: Any, leaves: list[Any], where: str) -> Tree:
    """The structure of a part; its leaves go to the end of `leaves`."""
    if part is None or isinstance(part, str):
        return "value", part
    if isinstance(part, Tensor | Shared | bool | int | float):
        leaves.append(part)
        return "leaf", len(leaves) - 1
    if isinstance(part, Mapping):
        for key in part:
            if not isinstance(key, str):
                raise TypeError(f"a key {key!r} of type {type(key).__name__}", where)
        return "dict", tuple((key, _tree(value, leaves, f"{where}[{key!r}]")) for key, value in part.items())
    if type(part) in (list, tuple):
        return type(part).__name__, tuple(_tree(p, leaves, _part(where, n)) for n, p in enumerate(part))
    raise TypeError(type(part).__name__, where)


def _grown(tree: Tree, leaves: Sequence[Any]) -> Any:
    kind, content = tree
    if kind == "leaf":
        return leaves[content]
    if kind == "value":
        return content
    if kind == "dict":
        return {key: _grown(part, leaves) for key, part in content}
    return (list if kind == "list" else tuple)(_grown(part, leaves) for part in content)


def places(tree: Tree, where: str = "argument ") -> list[str]:
    """Where each leaf stands, such as "argument 0['labels']"."""
    kind, content = tree
    if kind == "leaf":
        return [where]
    if kind == "value":
        return []
    if kind == "dict":
        return [place for key, part in content for place in places(part, f"{where}[{key!r}]")]
    return [place for n, part in enumerate(content) for place in places(part, _part(where, n))]


def _part(where: str, number: int) -> str:
    return f"{where}{number}" if where.endswith(" ") else f"{where}[{number}]"


def plain(tree: Tree) -> list[Any]:
    """A tree for JSON."""
    kind, content = tree
    if kind in ("leaf", "value"):
        return [kind, content]
    if kind == "dict":
        return [kind, [[key, plain(part)] for key, part in content]]
    return [kind, [plain(part) for part in content]]


def tree_of(document: Any) -> Tree:
    """The inverse of `plain`.

    Raises:
        ValueError: it is none.
    """
    match document:
        case ["leaf", int(number)] if number >= 0 and not isinstance(number, bool):
            return "leaf", number
        case ["value", str() | None as value]:
            return "value", value
        case ["dict", list(parts)] if all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in parts):
            return "dict", tuple((key, tree_of(part)) for key, part in parts)
        case ["list" | "tuple" as kind, list(parts)]:
            return kind, tuple(map(tree_of, parts))
    raise ValueError(f"no tree: {str(document)[:60]}")
