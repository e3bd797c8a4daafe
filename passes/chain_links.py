"""Finds layers that follow each other so that one kernel can run them (`layer_chain`).

conv1x1 → (+ earlier) → relu6 → depthwise → relu6 → conv1x1 → …
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch.fx import GraphModule, Node

from ..depthwise import DEPTHWISE
from ..layer_chain import chain_of
from ..plan import Plan
from ..pointwise_depthwise import Activation
from .activations import activation_of, only_user
from .calls import op_name, tensor_meta
from .writes import Writes, written_operands

Kind = Literal["pointwise", "depthwise"]
IDENTITY = Activation("identity")


@dataclass(frozen=True)
class Link:
    """A layer of a chain, and what is computed along with it.

    Args:
        nodes: the layer, then a sum, then an activation, as far as they exist; the last one is the result.
        adds: number of the tensor in the sum: 0 is what the chain reads, i the result of its i-th link.
    """

    kind: Kind
    nodes: tuple[Node, ...]
    activation: Activation = IDENTITY
    adds: int | None = None

    @property
    def layer(self) -> Node:
        return self.nodes[0]

    @property
    def result(self) -> Node:
        return self.nodes[-1]


class Links:
    """The chains of one graph.

    Args:
        kind: of a node that is a layer of such a chain; None of any other.
    """

    def __init__(self, gm: GraphModule, kind: Callable[[Node], Kind | None]) -> None:
        self._writes, self._kind = Writes(gm), kind

    def behind(self, first: Node) -> list[Link]:
        """The longest chain that begins with this layer, whoever else may read what is in it."""
        links: list[Link] = []
        layer: Node | None = first
        while layer is not None:
            kind = self._kind(layer)
            assert kind is not None
            links.append(self._link(layer, kind, links))
            layer = self._next(links[-1].result)
        return links

    def _link(self, layer: Node, kind: Kind, before: Sequence[Link]) -> Link:
        nodes, adds = [layer], None
        total = _only_reader(layer) if kind == "pointwise" and before else None
        if total is not None:
            adds = self._added(total, layer, before)
            nodes += [total] if adds is not None else []
        user = only_user(nodes[-1])
        activation = activation_of(user) if user is not None else None
        if user is None or activation is None:
            return Link(kind, tuple(nodes), adds=adds)
        return Link(kind, (*nodes, user), activation, adds)

    def _added(self, total: Node, layer: Node, before: Sequence[Link]) -> int | None:
        """The tensor of the chain that is added to what `layer` returns, if `total` is such a sum."""
        other = _other_summand(total, layer)
        tensors = [before[0].layer.args[0], *(link.result for link in before)]
        if other is None or other not in tensors:
            return None
        number = tensors.index(other)
        born = before[0].layer if number == 0 else other  # is what the kernel reads
        if self._writes.between(other, born, total) or (number == 0 and other in written_operands(total)):
            return None
        return number

    def _next(self, result: Node) -> Node | None:
        layers = [user for user in result.users if self._kind(user) and user.args[:1] == (result,)]
        if len(layers) != 1 or self._writes.between(result, result, layers[0]):
            return None
        return layers[0]


def is_closed(links: Sequence[Link]) -> bool:
    """Whether nobody else reads what is between the links, nor they what is not."""
    ends_last = _first_read_outside(links) == len(links) - 1
    return ends_last and all(link.adds is None or link.adds >= 0 for link in links)


def _first_read_outside(links: Sequence[Link]) -> int:
    """Number of the first link whose result others read; the last one's is for others."""
    members = {node for link in links for node in link.nodes}
    inside = (members.issuperset(link.result.users) for link in links[:-1])
    return next((i for i, is_inside in enumerate(inside) if not is_inside), len(links) - 1)


def ends(links: Sequence[Link]) -> tuple[Node, Node]:
    """The tensor that a chain reads, and the one that it returns."""
    x = links[0].layer.args[0]
    assert isinstance(x, Node)
    return x, links[-1].result


def part(links: Sequence[Link], begin: int, end: int) -> list[Link]:
    """A chain of its own: its tensors are counted from its own input; what lies before has no number."""
    return [link if link.adds is None else replace(link, adds=link.adds - begin) for link in links[begin:end]]


def paths(gm: GraphModule, kind: Callable[[Node], Kind | None]) -> Iterator[list[Link]]:
    """The longest chains that nobody else looks into, each layer in one of them."""
    links, seen = Links(gm, kind), set[Node]()
    for node in gm.graph.nodes:
        if node not in seen and kind(node):
            path = links.behind(node)
            while not is_closed(path):
                path = path[: _first_read_outside(path) + 1]
            seen.update(link.layer for link in path)
            yield path


def _only_reader(node: Node) -> Node | None:
    """The node that reads this one alone, as whatever operand."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_summand(total: Node, one: Node) -> Node | None:
    """What `total` adds to `one`, of equal shape; None if it is not such a sum."""
    name, operands = op_name(total).rstrip("_"), [*total.args]
    if name not in ("add", "iadd") or total.op == "output" or len(operands) != 2:
        return None
    if any(key != "alpha" or value != 1 for key, value in total.kwargs.items()):
        return None
    others = [operand for operand in operands if operand is not one]
    if len(others) != 1 or not isinstance(others[0], Node):
        return None
    mine, theirs = tensor_meta(one), tensor_meta(others[0])
    if mine is None or theirs is None or (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
        return None
    return others[0]


def planned_chains(gm: GraphModule, plan: Plan) -> dict[int, list[Link]]:
    """The chains that the layers of `plan` name, in a graph that is not lowered yet."""
    numbers = {d.site.node: number for d in plan if (number := chain_of(d.config)) is not None}
    kinds: dict[str, Kind] = {
        d.site.node: "depthwise" if d.kernel == DEPTHWISE.name else "pointwise"
        for d in plan
        if d.site.node in numbers
    }
    found: dict[int, list[Link]] = {}
    for number in dict.fromkeys(numbers.values()):
        members = [node for node in gm.graph.nodes if numbers.get(node.name) == number]

        def kind(node: Node, of: Sequence[Node] = members) -> Kind | None:
            return kinds[node.name] if node in of else None

        found[number] = Links(gm, kind).behind(members[0])
    return found
