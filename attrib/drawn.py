"""Which rows of its dataset a DataLoader draws for each batch, without a change to what it yields.

The rows are noted where the batch sampler hands them out; the batches come in that order, however many workers there are.
They are the rows of the batch as long as `collate_fn` keeps the order of the items, which is tried on the first batches.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, default_collate

from .errors import BatchError
from .generators import generators, random_state

TRIED = 3  # batches of each worker


class DrawnRows:
    """A loader's batch sampler that remembers what it handed out.

    Example:
        >>> loader = DataLoader(torch.arange(6), batch_size=4)
        >>> rows = DrawnRows(loader)
        >>> [rows.next() for batch in loader]
        [tensor([0, 1, 2, 3]), tensor([4, 5])]
        >>> rows.remove()
    """

    def __init__(self, loader: Any) -> None:
        """Raises BatchError where the loader's batches have no rows that could be known."""
        wrong = _without_rows(loader)
        if wrong:
            raise BatchError(
                f"the rows of the batches are not known: got {wrong}, expected a DataLoader that draws the rows of a "
                f"dataset. Say the ids instead: ids= a function of the batch, or an entry of it."
            )
        self._loader, self._sampler, self._collate = loader, loader.batch_sampler, loader.collate_fn
        self._drawn: deque[list[int]] = deque()
        vars(loader)["batch_sampler"] = self  # a DataLoader lets no other be set, as it has made its sampler of it
        if loader.collate_fn is not default_collate:
            loader.collate_fn = InOrder(loader.collate_fn)

    def __iter__(self) -> Iterator[list[int]]:
        self._drawn.clear()
        for rows in self._sampler:
            self._drawn.append(list(rows))
            yield rows

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def next(self) -> Tensor:
        """(B,) int64: the rows of the batch that came out next.

        Raises:
            BatchError: none was handed out, or what was are no row numbers.
        """
        rows = self._drawn.popleft() if self._drawn else None
        if rows is None or not all(isinstance(row, int) for row in rows):
            raise BatchError(
                f"the rows of a batch are not known: got {rows}, expected the integers that its sampler drew. Say the ids "
                f"instead: ids= a function of the batch, or an entry of it."
            )
        return torch.tensor(rows)

    def remove(self) -> None:
        """Leave the loader as it was."""
        vars(self._loader)["batch_sampler"] = self._sampler
        self._loader.collate_fn = self._collate


def _without_rows(loader: Any) -> str | None:
    if not isinstance(loader, DataLoader):
        return f"a {type(loader).__name__}"
    if isinstance(loader.dataset, IterableDataset):
        return "a DataLoader of an IterableDataset"
    if loader.batch_sampler is None:
        return "a DataLoader with batch_size=None"
    return None if getattr(loader, "in_order", True) else "a DataLoader with in_order=False"


class InOrder:
    """A collate function, whose first batches are collated a second time from the items in reverse: where rows do not come
    out reversed they are not the items' in their order."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate, self._left = collate, TRIED

    def __call__(self, items: Any) -> Any:
        if not self._left or not isinstance(items, list) or len(items) < 2:
            return self._collate(items)
        self._left -= 1
        state, again, collate = generators(), deepcopy(items)[::-1], deepcopy(self._collate)
        batch = self._collate(items)
        with random_state(state):
            turned = collate(again)
        if not _turned(tree_leaves(batch), tree_leaves(turned), len(items)):
            raise BatchError(
                "the rows of a batch are not known: got a collate_fn that gives other rows, or in another order, where the "
                "items come in reverse, expected the items' own in their order. Say the ids instead: ids= a function of "
                "the batch, or an entry of it."
            )
        return batch


def _turned(leaves: Sequence[Any], others: Sequence[Any], size: int) -> bool:
    """Whether there are rows, and all are each other's in reverse."""
    pairs = [
        (a, b) for a, b in zip(leaves, others, strict=False) if isinstance(a, Tensor) and a.dim() and len(a) == size
    ]
    equal = (isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b.flip(0)) for a, b in pairs)
    return bool(pairs) and len(leaves) == len(others) and all(equal)
