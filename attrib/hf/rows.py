"""Which examples a batch of a DataLoader is made of: every item carries the number of its row until it is collated."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..errors import BatchError

IDS = "attrib_ids"  # what they are called in a batch, until the model is called


class Row(NamedTuple):
    """number: its place in the dataset; None where that has no order."""

    number: int | None
    item: Any


class Rows(Dataset):
    """A dataset whose items say their numbers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Row:
        return Row(int(number), self.dataset[number])

    def __getitems__(self, numbers: Sequence[int]) -> list[Row]:
        several = getattr(self.dataset, "__getitems__", None)
        items = several(numbers) if callable(several) else [self.dataset[n] for n in numbers]
        return [Row(int(n), item) for n, item in zip(numbers, items, strict=True)]


class Stream(IterableDataset):
    """One that is walked through: its items have no numbers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Row]:
        return (Row(None, item) for item in self.dataset)


@dataclass(frozen=True)
class Collated:
    """Collates rows as the user does their items, and puts the ids beside. column: of the ids, None for the numbers of the
    rows; values: the dataset that has it, where the items that are collated do not."""

    collate: Callable[[list[Any]], Any]
    column: str | None
    values: Any = None

    def __call__(self, rows: list[Row]) -> Any:
        ids = [row.number if self.column is None else self._id(row) for row in rows]
        batch = self.collate([self._without(row.item) for row in rows])
        if not isinstance(batch, MutableMapping):
            raise BatchError(
                f"a batch is no dict: got {type(batch).__name__} from the data collator, expected the arguments of the "
                f"model by name. Let the collator return a dict."
            )
        batch[IDS] = ids if all(isinstance(i, str) for i in ids) else torch.tensor(ids)
        return batch

    def _without(self, item: Any) -> Any:
        if self.column is None or not isinstance(item, Mapping) or self.column not in item:
            return item
        return {name: part for name, part in item.items() if name != self.column}

    def _id(self, row: Row) -> str | int:
        item = row.item
        if not (isinstance(item, Mapping) and self.column in item) and self.values is not None:
            item = self.values[row.number]
        if not isinstance(item, Mapping) or self.column not in item:
            raise BatchError(
                f"the dataset has no such column: got ids={self.column!r}, expected a key of its items, at row "
                f"{row.number}. Name another, or leave ids= out: the ids are then the numbers of the rows."
            )
        value = item[self.column]
        value = value.item() if isinstance(value, Tensor | np.generic) and value.size else value
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise BatchError(
                f"an id is neither a number nor a text: got {value!r} in column {self.column!r}, expected an integer of 0 "
                f"or more, or a string, at row {row.number}."
            )
        return value


def numbered(loader: DataLoader, column: str | None, values: Any) -> DataLoader:
    """The same loader, whose batches hold their ids, (B,) int64 or a list of strings, under `IDS`. Samplers, workers and
    random numbers are as they were."""
    held = getattr(loader, "base_dataloader", loader)  # by what accelerate prepares
    if not isinstance(held, DataLoader):
        raise BatchError(
            f"the batches come from no DataLoader: got {type(held).__name__} from get_train_dataloader, expected a torch "
            f"DataLoader, whose items can be numbered."
        )
    source = held.dataset
    rows = Stream(source) if isinstance(source, IterableDataset) else Rows(source)
    object.__setattr__(held, "dataset", rows)  # DataLoader guards it, for the sake of its sampler, which stays right
    held.collate_fn = Collated(held.collate_fn, column, values)
    return loader
