"""Which nodes of a graph a generated kernel computes.

Inductor lists with each kernel the nodes that it comes from, and with them those that its inputs come from.
Here the list is cut at the operators that are kernels (or library calls) of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Graph, Node


def computed_nodes(
    graph: Graph, listed: Sequence[str], arguments: Iterable[str], externs: Sequence[str]
) -> tuple[Node, ...]:
    """The nodes that a kernel computes, in graph order.

    Args:
        listed: names of the nodes that Inductor lists.
        arguments: names of the buffers and constants that the kernel is called with.
        externs: the library calls of the program, `convolution` or `aten.sort.default`.
    """
    names, read = set(listed), set(arguments)
    nodes = [node for node in graph.nodes if node.name in names]
    borders = [node for node in nodes if _is_border(node, externs)]
    own = [node for node in borders if read & {operand.name for operand in node.all_input_nodes[1:2]}]
    own = [node for node in own if _is_block_sparse(node)]
    if own:
        after = [node for node in nodes if node not in borders and _ancestors(node) & set(own)]
        later = {border for border in borders if border not in own and _ancestors(border) & set(own)}
        return tuple(n for n in nodes if n in own or (n in after and not _ancestors(n) & later))
    # A border at the end of the list only asked for the layout of what the kernel writes.
    before = set[Node]()
    for border in borders:
        if any(border in _ancestors(node) for node in nodes):
            before |= _ancestors(border)
    return tuple(node for node in nodes if node not in before and node not in borders)


def _is_border(node: Node, externs: Sequence[str]) -> bool:
    target = str(node.target)
    return _is_block_sparse(node) or target in externs or target.split(".")[-2:-1] in [[e] for e in externs]


def _is_block_sparse(node: Node) -> bool:
    return str(node.target).startswith("blocksparse.")


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending.extend(current.all_input_nodes)
    return found
