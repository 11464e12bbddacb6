"""The values of a graph's nodes at the two ends of a step, as the rules read them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import fx

Values = dict[fx.Node, Any]
Pairs = Iterator[tuple[fx.Node, Any]]


class Ends(NamedTuple):
    """The value of every node at theta0 and at theta1."""

    first: Values
    last: Values

    def of(self, node: fx.Node) -> tuple[Any, Any]:
        return self.first[node], self.last[node]

    def args(self, node: fx.Node, end: int) -> tuple[Any, ...]:
        return fx.map_arg(node.args, self[end].__getitem__)
