"""Which nodes of a graph lie channels first around our kernels, for Inductor to leave them so.

Inductor wants everything around convolutions channels last. A node between kernels of ours lies as those that
write its operands do; where those differ, or there are none, as those do that read it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from torch.fx import Graph, Node

from ..kernel_variant import KernelConfig
from ..layouts import Layouts

_CONVOLUTIONS = ("convolution", "qconv")
"""Parts of their names in any library: dense ones are channels last."""


def channels_first_nodes(graph: Graph) -> set[Node]:
    kernels = {node: found for node in graph.nodes if (found := _layouts(node))}
    if not any(layouts.reads_first or layouts.writes_first for layouts in kernels.values()):
        return set()
    written = _sides(graph.nodes, kernels, lambda k: k.writes_first, lambda node: node.all_input_nodes)
    read = _sides(reversed(graph.nodes), kernels, lambda k: k.reads_first, lambda node: node.users)
    first = {node for node in graph.nodes if _lies_first(written[node], read[node])}
    return {node for node in first if node not in kernels} | {n for n, k in kernels.items() if k.writes_first}


def _lies_first(written: set[bool], read: set[bool]) -> bool:
    return written == {True} or (written != {False} and read == {True})


def _sides(
    nodes: Iterable[Node],
    kernels: dict[Node, Layouts],
    side: Callable[[Layouts], bool],
    neighbours: Callable[[Node], Iterable[Node]],
) -> dict[Node, set[bool]]:
    """For each node, whether the kernels nearest to it on one side hold tensors channels first."""
    seen: dict[Node, set[bool]] = {}
    for node in nodes:
        found = (
            {side(kernels[other])} if other in kernels else seen.get(other, set())
            for other in neighbours(node)
        )
        seen[node] = set(itertools.chain.from_iterable(found))
    return seen


def _layouts(node: Node) -> Layouts | None:
    """What a convolution reads and writes; None for other nodes."""
    if node.op != "call_function":
        return None
    namespace, _, name = str(node.target).partition(".")
    if namespace == "blocksparse" and isinstance(node.args[-1], str):
        return Layouts.of(KernelConfig.decode(node.args[-1]).parameters)
    is_convolution = any(part in name for part in _CONVOLUTIONS)
    return Layouts() if is_convolution else None
