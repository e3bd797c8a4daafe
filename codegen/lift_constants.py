"""Weights of a graph as inputs with readable names, so that the graph can change device without them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..errors import LayerError
from ..passes.calls import layer_call, layer_name
from ..planning import copy_graph
from . import inductor_api

_OPERANDS = ("input", "values", "row_ptr", "tile_index", "bias")
_RESERVED = re.compile(r"(arg|buf|s|u|tmp|triton)_?\d")


@dataclass(frozen=True)
class LiftedGraph:
    """A graph whose attributes have become inputs, after its own.

    Args:
        graph: takes and returns flat tuples.
        fake_inputs: one for each input, on the CPU.
        inputs: names of the graph's own inputs.
        constants: value of each other input, by name.
        layers: qualified name of the layer that reads a constant, by the constant's name.
        tiles: names of the constants that are the tiles of a block-sparse layer.
        unflatten: from the flat tuple to what the original graph returns.
    """

    graph: GraphModule
    fake_inputs: tuple[Any, ...]
    inputs: tuple[str, ...]
    constants: dict[str, Tensor]
    layers: dict[str, str]
    tiles: frozenset[str]
    unflatten: Callable[[Sequence[Any]], Any]

    @property
    def fake_mode(self) -> Any:
        return inductor_api.fake_mode_for(self.fake_inputs)


def lift_constants(gm: GraphModule, example_inputs: Sequence[Any] | None = None) -> LiftedGraph:
    """Copies `gm` with its parameters and buffers as inputs. Raises `LayerError` unless all is on the CPU."""
    unflatten = _unflattener(gm)
    gm = copy_graph(gm)
    graph = gm.graph
    graph.set_codegen(CodeGen())
    own = graph.find_nodes(op="placeholder")
    leaves = pytree.tree_leaves(list(example_inputs)) if example_inputs is not None else [None] * len(own)
    fake_mode = inductor_api.fake_mode_for(_recorded(node) for node in own)
    fakes = [_fake(fake_mode, _recorded(node), leaf) for node, leaf in zip(own, leaves, strict=True)]
    constants: dict[str, Tensor] = {}
    layers: dict[str, str] = {}
    tiles = set()
    lifted: dict[str, Node] = {}
    last = own[-1] if own else None
    taken = {node.name for node in own}
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in lifted:
            value = operator.attrgetter(node.target)(gm)
            if not isinstance(value, Tensor):
                continue
            layer, role = _owner(node)
            name = _fresh(f"{layer}_{role}" if layer and role else node.target, taken)
            with graph.inserting_after(last) if last else graph.inserting_before():
                last = lifted[node.target] = graph.placeholder(name)
            constants[name] = value.detach()
            if layer:
                layers[name] = layer
            if role == "values":
                tiles.add(name)
            last.meta["val"] = fake_mode.from_tensor(value.detach(), static_shapes=True)
            fakes.append(last.meta["val"])
        node.replace_all_uses_with(lifted[node.target])
        graph.erase_node(node)
    output = graph.output_node()
    output.args = (tuple(pytree.tree_leaves(output.args[0])),)
    gm.recompile()
    for fake in fakes:
        if isinstance(fake, Tensor) and fake.device.type != "cpu":
            raise LayerError(
                "offline.generate",
                "a graph on the CPU",
                f"a tensor on {fake.device}",
                "Move the model to the CPU.",
            )
    names = tuple(node.target for node in own)
    return LiftedGraph(gm, tuple(fakes), names, constants, layers, frozenset(tiles), unflatten)


@torch.no_grad()
def fold_constants(graph: GraphModule, lifted: LiftedGraph) -> tuple[list[str], dict[str, Tensor]]:
    """Computes in `graph` what depends on constants alone, and drops the constants it no longer reads.

    Args:
        graph: `lifted.graph` after decomposition; its inputs are renamed to those of `lifted`.

    Returns:
        the names of the inputs, in order, and the values of those that are constants.
    """
    values: dict[Node, Any] = {}
    nodes = graph.graph.find_nodes(op="placeholder")
    names = [*lifted.inputs, *lifted.constants]
    for node, name in zip(nodes, names, strict=True):
        node.target = node.name = name
        if name in lifted.constants:
            values[node] = lifted.constants[name]
    for node in graph.graph.nodes:
        if node.op != "call_function" or not node.all_input_nodes or _is_random(node.target):
            continue
        if all(operand in values for operand in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), lambda operand: values[operand])
            values[node] = node.target(*args, **kwargs)
    _replace_folded(graph, values, lifted)
    constants = {
        node.target: values[node] for node in graph.graph.find_nodes(op="placeholder") if node in values
    }
    return [node.target for node in graph.graph.find_nodes(op="placeholder")], constants


def _replace_folded(graph: GraphModule, values: dict[Node, Any], lifted: LiftedGraph) -> None:
    """Makes an input of each folded tensor that something else reads."""
    taken = {node.name for node in graph.graph.nodes}
    last = graph.graph.find_nodes(op="placeholder")[-1]
    for node in [n for n in values if n.op == "call_function"]:
        readers = [user for user in node.users if user not in values]
        if not readers or not isinstance(values[node], Tensor):
            continue
        source = _first_constant(node)
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(_fresh(f"{source}_{node.name}", taken))
        last.meta["val"] = lifted.fake_mode.from_tensor(values[node], static_shapes=True)
        values[last] = values[node]
        if source in lifted.layers:
            lifted.layers[last.name] = lifted.layers[source]
        for reader in readers:
            reader.replace_input_with(node, last)
    graph.graph.eliminate_dead_code()
    for node in graph.graph.find_nodes(op="placeholder"):
        if node in values and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()


def _first_constant(node: Node) -> str:
    while node.op != "placeholder":
        node = node.all_input_nodes[0]
    return str(node.target)


def _is_random(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _owner(node: Node) -> tuple[str, str]:
    """The layer that reads a constant and as what: `("layer1.0.conv2", "values")`; else empty."""
    for user in node.users:
        layer = user.meta.get("blocksparse_layer")
        if layer:
            return layer, _OPERANDS[user.args.index(node)]
        if layer_call(user) is not None and user.meta.get("nn_module_stack"):
            return layer_name(user), ""
    return "", ""


def _fresh(name: str, taken: set[str]) -> str:
    """`name` as an identifier that neither the graph nor Inductor uses."""
    name = re.sub(r"\W", "_", str(name)).strip("_")
    if not name or name[0].isdigit() or _RESERVED.match(name):
        name = f"layer_{name}"
    stem, i = name, 1
    while name in taken:
        name, i = f"{stem}_{i}", i + 1
    taken.add(name)
    return name


def _recorded(node: Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _fake(fake_mode: Any, recorded: Any, example: Any) -> Any:
    value = example if recorded is None else recorded
    if isinstance(value, Tensor) and not inductor_api.is_fake(value):
        return fake_mode.from_tensor(value, static_shapes=True)
    return value


def _unflattener(gm: GraphModule) -> Callable[[Sequence[Any]], Any]:
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is not None:
        return lambda flat: pytree.tree_unflatten(list(flat), info.out_spec)
    spec = pytree.tree_structure(gm.graph.output_node().args[0], is_leaf=lambda leaf: isinstance(leaf, Node))
    return lambda flat: pytree.tree_unflatten(list(flat), spec)
