"""The generated source of each layer, by compiling the model the way the backend does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .gpu_devices import GpuSpec
from .layer_chain import chain_of
from .packing import PackedWeight
from .plan import Decision, Plan
from .variants import VARIANTS

# What Inductor's Python output looks like: weights, kernels, calls of kernels.
_CONSTANT = re.compile(r"^(\w+) = None  # .*?torch\.\w+ \(([\d, ]+)\) ", re.MULTILINE)
_KERNEL = re.compile(r"^(\w+) = async_compile\.cpp_pybinding\(.*?, r?'''(.*?)'''\)", re.MULTILINE | re.DOTALL)
_CALL = re.compile(r"^ +(\w+)\(((?:\w+, )*\w+)\)$", re.MULTILINE)

Shape = tuple[int, ...]


def kernel_sources(model: torch.nn.Module, inputs: tuple[Any, ...], plan: Plan) -> dict[str, str]:
    """C++ source by layer name, for the layers of `plan` on a block-sparse kernel.

    Layers of the same shape, pattern and epilogue share a source.
    """
    if all(decision.is_dense for decision in plan):
        return {}
    from .backend import blocksparse
    from .codegen import inductor_api
    from .trace import trace

    graph = trace(model, *inputs)
    with torch.no_grad(), inductor_api.tracing(None), inductor_api.capture_sources() as captured:
        blocksparse(graph, list(_tensors(inputs)), options={"plan": plan})
    return assign([d for d in plan if not d.is_dense], "\n".join(captured))


def gpu_sources(
    model: torch.nn.Module, inputs: tuple[Any, ...], plan: Plan, device: GpuSpec
) -> dict[str, str]:
    """Fused Triton source by layer name, for the layers of `plan` on a block-sparse kernel; needs no GPU.

    Layers of the same shape, number of tiles and epilogue share a source.
    """
    if all(decision.is_dense for decision in plan):
        return {}
    from .gpu_program import gpu_program

    _, program = gpu_program(model, inputs, device, plan=plan)
    found = {layer: kernel.source for kernel in program.templates for layer in kernel.layers}
    return {d.site.name: found[d.site.name] for d in plan if d.site.name in found}


def assign(decisions: Iterable[Decision], generated: str) -> dict[str, str]:
    """Finds each layer's kernel in Inductor's output by the shapes of its packed weight, in graph order."""
    shapes = {name: _sizes(sizes) for name, sizes in _CONSTANT.findall(generated)}
    kernels = dict(_KERNEL.findall(generated))
    calls = [
        (kernels[name], {shapes[a] for a in arguments.split(", ") if a in shapes})
        for name, arguments in _CALL.findall(generated)
        if name in kernels
    ]
    found = {}
    for together in _kernels_of(decisions):
        wanted = _packed_shapes(together)
        match = next((call for call in calls if wanted <= call[1]), None)
        if match is not None:
            calls.remove(match)
            found.update({decision.site.name: match[0].strip() for decision in together})
    return found


def _kernels_of(decisions: Iterable[Decision]) -> Iterable[list[Decision]]:
    """Layers that share a kernel, as in a chain; most have one to themselves."""
    groups: dict[int | str, list[Decision]] = {}
    for decision in decisions:
        number = chain_of(decision.config)
        groups.setdefault(decision.site.node if number is None else number, []).append(decision)
    return groups.values()


def _packed_shapes(decisions: Sequence[Decision]) -> set[Shape]:
    """Shapes of the tiles and of the row pointer of a kernel; depthwise layers have tiles alone."""
    packed = [_packed(decision) for decision in decisions]
    if chain_of(decisions[0].config) is None:
        return {tuple(t.shape) for t in (packed[0].values, packed[0].row_ptr) if t.numel()}
    tables = [p for p in packed if p.row_ptr.numel()]
    operands = ((p.values for p in tables), (p.row_ptr for p in tables))
    return {(1, sum(tensor.numel() for tensor in parts)) for parts in operands}


def _packed(decision: Decision) -> PackedWeight:
    assert decision.pattern is not None
    return VARIANTS[decision.kernel].pack(torch.zeros(decision.pattern.weight_shape), decision.pattern)


def _sizes(text: str) -> Shape:
    return tuple(int(size) for size in text.replace(" ", "").strip(",").split(","))


def _tensors(inputs: Iterable[Any]) -> Iterable[torch.Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(list(inputs)) if isinstance(leaf, torch.Tensor))
