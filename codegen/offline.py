"""Inductor's GPU code for a graph, on a machine without a GPU: generated, read, run, cross-compiled.

gm = bsc.trace(model, x)                      # on the CPU, or after passes.lower_sites
program = offline.generate(gm, (x,), "sm_90")
program.source                                # Inductor's whole Python wrapper
program.kernels[0].source                     # one fused Triton kernel, as text
program.run(x)                                # on CPU tensors: Triton's interpreter, torch for the rest
program.kernels[0].compile().resources        # registers, spills, shared memory …
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from ..errors import LayerError
from ..gpu_devices import GpuSpec
from . import inductor_api, lowerings
from .fused_nodes import computed_nodes
from .lift_constants import LiftedGraph, fold_constants, lift_constants
from .mock_gpu import GpuTarget, gpu_target, mock_gpu
from .triton_kernel import TritonKernel
from .wrapper_text import extern_calls, kernel_definition, read_kernels

_DEVICE = torch.device("cuda", 0)


def generate(
    gm: GraphModule,
    example_inputs: Sequence[Any] | None = None,
    target: str | GpuTarget | GpuSpec = "sm_90",
    *,
    config: Mapping[str, Any] | None = None,
) -> OfflineProgram:
    """The program that Inductor would run for `gm` on `target`, with weights frozen. Needs no GPU.

    Args:
        gm: an ATen-level graph with CPU tensors (`trace`, or that after the package's passes), weights as
            attributes. Its nodes hold fake tensors; sizes may be symbolic. It is not changed.
        example_inputs: what the graph takes, where its nodes hold no fake tensors.
        target: `"sm_80"`, `"sm_90"`, `"gfx942"` … or a device of the planner.
        config: Inductor options.

    Raises:
        OptionError: for an unknown target, or without Triton.
        LayerError: for a graph that writes to its inputs or weights, or that is not on the CPU.
    """
    found = gpu_target(target)
    lowerings.register()
    lifted = lift_constants(gm, example_inputs)
    options = {**_options(gm), **(config or {})}
    with mock_gpu(found):  # checks for Triton before the work starts
        pass
    try:
        graph = inductor_api.decompose(lifted.graph, lifted.fake_inputs)
    except RuntimeError as error:
        raise LayerError(
            "offline.generate",
            "a graph that leaves its inputs and weights unchanged",
            str(error).splitlines()[0],
            "Put the model in eval mode, and return no input as it is.",
        ) from error
    names, constants = fold_constants(graph, lifted)
    fake_mode = lifted.fake_mode
    with mock_gpu(found):
        inductor_api.retarget(graph, _DEVICE)
        inputs = [inductor_api.fake_on(_DEVICE, value, fake_mode) for value in _input_values(graph)]
        inductor_api.propagate(graph, fake_mode, inputs)
        if inductor_api.wants_channels_last(graph, options):
            for name in _convolution_weights(graph) & set(constants):
                constants[name] = constants[name].contiguous(memory_format=torch.channels_last)
                inputs[names.index(name)] = inductor_api.fake_on(_DEVICE, constants[name], fake_mode)
        source = inductor_api.generate_code(graph, fake_mode, inputs, options)
    return _program(source, found, graph.graph, lifted, names, constants)


@dataclass(frozen=True)
class OfflineProgram:
    """Inductor's output for one graph and one target.

    Attributes:
        source: the Python wrapper, kernels included.
        target: what it was generated for.
        kernels: the Triton kernels in order of definition.
        externs: what it calls besides (`convolution`, `addmm` …), in order.
        constants: weights by the name that the wrapper calls them, as CPU tensors: `layer1_0_conv2_values`.
        constant_layers: qualified name of the layer that each of these belongs to, where known.
    """

    source: str
    target: GpuTarget
    kernels: tuple[TritonKernel, ...]
    externs: tuple[str, ...]
    constants: Mapping[str, Tensor] = field(repr=False)
    constant_layers: Mapping[str, str] = field(repr=False)
    _arguments: tuple[str, ...] = field(repr=False)
    _unflatten: Callable[[Sequence[Any]], Any] = field(repr=False)

    def kernel(self, name: str) -> TritonKernel:
        """The first kernel that has this name, or computes the layer with this qualified name."""
        for kernel in self.kernels:
            if name == kernel.name or name in kernel.layers:
                return kernel
        raise KeyError(f"{name}: no such kernel or layer; kernels: {', '.join(k.name for k in self.kernels)}")

    @property
    def templates(self) -> tuple[TritonKernel, ...]:
        """The kernels of block-sparse layers."""
        return tuple(kernel for kernel in self.kernels if kernel.is_template)

    def run(self, *inputs: Any) -> Any:
        """Runs the whole program on CPU tensors: kernels in Triton's interpreter, the rest by torch.

        Returns:
            What the graph returns.
        """
        given = iter(pytree.tree_leaves(inputs))
        arguments = [
            self.constants[name] if name in self.constants else next(given) for name in self._arguments
        ]
        left = sum(1 for _ in given)
        if left:
            raise TypeError(f"{left} inputs too many; the program takes {self.inputs}")
        call = _executable(self.source, {kernel.name: kernel for kernel in self.kernels})
        with torch.no_grad(), _without_device():
            return self._unflatten(list(call(arguments)))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what `run` takes."""
        return tuple(name for name in self._arguments if name not in self.constants)


# ---- generating ----------------------------------------------------------------------------------------


def _options(gm: GraphModule) -> dict[str, Any]:
    """The options that the backend gives Inductor."""
    sparse = torch.ops.blocksparse.conv.default
    # Inductor looks for dense convolutions to see that channels-last pays; ours hide that.
    return {"force_layout_optimization": any(node.target is sparse for node in gm.graph.nodes)}


def _input_values(graph: GraphModule) -> list[Tensor]:
    return [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]


def _convolution_weights(graph: GraphModule) -> set[str]:
    """Names of the inputs that are weights of dense 2-D convolutions."""
    convolutions = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    return {node.args[1].target for node in convolutions if node.args[1].meta["val"].dim() == 4}


def _program(
    source: str,
    target: GpuTarget,
    graph: Graph,
    lifted: LiftedGraph,
    names: Sequence[str],
    constants: dict[str, Tensor],
) -> OfflineProgram:
    layers = {name: lifted.layers[name] for name in constants if name in lifted.layers}
    externs = extern_calls(source)
    kernels = []
    for text in read_kernels(source):
        arguments = list(dict.fromkeys(argument for call in text.calls for argument in call))
        # An epilogue may read a dense layer's bias: the layers of a kernel are those whose tiles it reads.
        read = [name for name in arguments if name in lifted.tiles] or arguments
        owners = tuple(dict.fromkeys(layers[name] for name in read if name in layers))
        nodes = computed_nodes(graph, text.nodes, arguments, externs)
        fused, ops = tuple(node.name for node in nodes), tuple(str(node.target) for node in nodes)
        kernels.append(TritonKernel(text.name, text.text, target, fused, ops, owners, text.calls))
    return OfflineProgram(
        source,
        target,
        tuple(kernels),
        extern_calls(source),
        constants,
        layers,
        tuple(names),
        lifted.unflatten,
    )


# ---- running -------------------------------------------------------------------------------------------


def _executable(source: str, kernels: Mapping[str, TritonKernel]) -> Callable[[list[Any]], Any]:
    """The wrapper's `call`, with these kernels, on CPU tensors."""
    tree = ast.parse(source)
    tree.body = [statement for statement in tree.body if not _is_for_device(statement)]
    namespace: dict[str, Any] = {"__name__": "blocksparse_offline"}
    exec(compile(tree, "<offline wrapper>", "exec"), namespace)
    namespace.update(kernels)
    namespace.update(
        empty_strided_cuda=lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
        get_raw_stream=lambda index: 0,
        device=lambda *_, **__: torch.device("cpu"),
        extern_kernels=_ExternKernels(namespace.get("extern_kernels")),
    )
    return namespace["call"]  # type: ignore[no-any-return]


def _is_for_device(statement: ast.stmt) -> bool:
    """Whether this statement of a wrapper compiles kernels, or imports what only a CUDA build has."""
    text = ast.unparse(statement)
    return (
        kernel_definition(statement) is not None
        or text.startswith(("async_compile", "del async_compile", "if __name__"))
        or "RawStream" in text.split("\n")[0]
    )


@contextlib.contextmanager
def _without_device() -> Iterator[None]:
    guard = lambda index: contextlib.nullcontext()  # noqa: E731
    with (
        mock.patch.object(torch.cuda, "_DeviceGuard", guard),
        mock.patch.object(torch.cuda, "set_device", lambda index: None),
    ):
        yield


class _ExternKernels:
    """Dense operators, with the output layouts of a GPU."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def convolution(
        self, input: Tensor, weight: Tensor, *, bias: Tensor | None = None, **geometry: Any
    ) -> Tensor:
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        out = torch.convolution(input, weight, bias, *(geometry[name] for name in names))
        return out.contiguous(memory_format=_suggested_format(input, weight))


def _suggested_format(*operands: Tensor) -> torch.memory_format:
    """Channels-last if any operand is: the rule of cuDNN."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(operands[0].dim(), torch.contiguous_format)
    last = any(t.is_contiguous(memory_format=wanted) and not t.is_contiguous() for t in operands)
    return wanted if last else torch.contiguous_format


__all__ = ["OfflineProgram", "TritonKernel", "generate"]
