"""The values of a graph's nodes at the two ends of a step, as the rules read them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

Values = dict[fx.Node, Any]
Pairs = Iterator[tuple[fx.Node, Any]]


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Of the call. torch's own type for them is the union of all that a graph can hold."""
    return node.args


def run_node(node: fx.Node, values: Values) -> Any:
    """Its operation on these values."""
    operation: Any = node.target
    args: Any = fx.map_arg(node.args, values.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, values.__getitem__)
    if operation is torch.ops.aten.view.default:  # a mapped-over tensor may not be contiguous
        return torch.reshape(*args)
    return operation(*args, **kwargs)


class Ends(NamedTuple):
    """The value of every node at theta0 and at theta1."""

    first: Values
    last: Values

    def of(self, node: fx.Node) -> tuple[Any, Any]:
        return self.first[node], self.last[node]

    def args(self, node: fx.Node, end: int) -> tuple[Any, ...]:
        return fx.map_arg(node.args, self[end].__getitem__)
