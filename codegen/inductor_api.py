"""The one module that touches torch's private surface (Inductor, Dynamo, guards).

Everything else in the package imports these names from here, so that a torch release that moves
something is met in one place. Supported: torch 2.11 to 2.15.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor
import torch._inductor.config as inductor_config
import torch._inductor.lowering  # before codegen.cpp_template: they import each other
from torch._dynamo.exc import RestartAnalysis
from torch._guards import TracingContext
from torch._guards import tracing as _tracing
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

log = logging.getLogger("blocksparse_compiler")

# ---- the backend's needs ---------------------------------------------------------------------------


@functools.cache
def inductor_option_names() -> frozenset[str]:
    """Names of every Inductor option a user may pass."""
    return frozenset(torch._inductor.list_options())


def mode_options(mode: str | None) -> dict[str, Any]:
    """What a `torch.compile` mode means for Inductor. Raises RuntimeError for an unknown mode."""
    return dict(torch._inductor.list_mode_options(mode)) if mode and mode != "default" else {}


def compile_fx(gm: GraphModule, inputs: Sequence[Any], config: Mapping[str, Any]) -> Callable[..., Any]:
    """Inductor's compiler on a Dynamo-level graph, under these options."""
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    with best_linear_library(), _channels_first_regions():
        compiled: Any = inductor_compile_fx(gm, list(inputs), config_patches=dict(config))
    return compiled  # type: ignore[no-any-return]


def best_linear_library() -> contextlib.AbstractContextManager[Any]:
    """Has Inductor prepack frozen fp32 linear layers with oneDNN where MKL is slow.

    Inductor takes MKL's packed product for static batch sizes, and oneDNN's for symbolic ones. On CPUs
    that are not Intel's, MKL runs at less than half of oneDNN's rate (measured on Zen 5: 210 against
    500 GFLOP/s).
    """
    if not (_mkl_is_slow() and torch.backends.mkldnn.is_available()):
        return contextlib.nullcontext()
    # Inductor asks the same question when it registers what oneDNN's convolutions fuse, once per process.
    from torch._inductor.fx_passes.mkldnn_fusion import _mkldnn_fusion_init

    _mkldnn_fusion_init()
    return mock.patch.object(torch.ops.mkldnn, "_is_mkldnn_acl_supported", lambda: True)


def _channels_first_regions() -> contextlib.AbstractContextManager[Any]:
    """Has Inductor leave the regions of our kernels that lie channels first as they are.

    It makes everything around a convolution channels last, and would copy what kernels of ours read.
    """
    from .channels_first import channels_first_nodes

    wants_last = getattr(GraphLowering, "find_nodes_prefer_channels_last", None)
    if wants_last is None:
        log.info(
            "this torch has no nodes that prefer channels last: regions of the other layout may be copied"
        )
        return contextlib.nullcontext()

    def others(graph: Any) -> Any:
        return wants_last(graph) - channels_first_nodes(graph.module.graph)

    return mock.patch.object(GraphLowering, "find_nodes_prefer_channels_last", others)


@functools.cache
def _mkl_is_slow() -> bool:
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def is_static_input(value: Any) -> bool:
    """Whether Dynamo passes this graph input by reference to a parameter or buffer of the model."""
    return isinstance(value, torch.Tensor) and getattr(value, "_dynamo_static_input_type", None) is not None


def fake_mode_of(gm: GraphModule) -> Any:
    """The fake mode that Dynamo traced this graph with, or None for a graph without tensor inputs."""
    values = (node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder"))
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


@contextlib.contextmanager
def tracing(fake_mode: Any) -> Iterator[None]:
    """A fresh tracing context around a compilation that Dynamo did not start."""
    with _tracing(TracingContext(fake_mode)):
        yield


class _CacheKey(CustomGraphPass):
    """Rewrites nothing; its uuid makes Inductor's graph cache see our templates and headers."""

    def __init__(self, key: str, inner: Any = None) -> None:
        self._key, self._inner = key, inner

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self._inner is not None:
            self._inner(graph)

    def uuid(self) -> Any:
        if self._inner is None:
            return self._key
        inner = self._inner.uuid() if isinstance(self._inner, CustomGraphPass) else None
        return None if inner is None else (self._key, inner)


def cache_key_pass(key: str, config: Mapping[str, Any]) -> CustomGraphPass:
    """A post-grad pass that adds `key` to the cache key and still runs the user's own pass."""
    name = "post_grad_custom_post_pass"
    return _CacheKey(key, config.get(name, getattr(inductor_config, name)))


def aoti_compile_and_package(program: Any, path: str, config: Mapping[str, Any]) -> None:
    """Compiles an exported program ahead of time into the package at `path`."""
    with _channels_first_regions():
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=dict(config))


@contextlib.contextmanager
def capture_sources() -> Iterator[list[str]]:
    """Collects the Python and C++ text of every graph that Inductor compiles meanwhile.

    A graph served from Inductor's cache is reported as well.
    """
    sources: list[str] = []
    original = GraphLowering.__dict__["save_output_code"]
    GraphLowering.save_output_code = staticmethod(sources.append)
    try:
        yield sources
    finally:
        GraphLowering.save_output_code = original


# ---- the lowerings' needs --------------------------------------------------------------------------

from torch._inductor import ir  # noqa: E402
from torch._inductor.codegen.cpp import parallel_num_threads  # noqa: E402
from torch._inductor.codegen.cpp_template import CppTemplate  # noqa: E402
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel  # noqa: E402
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP, cexpr_index  # noqa: E402
from torch._inductor.cpu_vec_isa import pick_vec_isa  # noqa: E402
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering  # noqa: E402
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate  # noqa: E402
from torch._inductor.utils import Placeholder  # noqa: E402
from torch._inductor.virtualized import V, ops  # noqa: E402
from torch.utils._sympy.functions import FloorDiv, ModularIndexing  # noqa: E402
from torch.utils._triton import has_triton_package  # noqa: E402

KERNEL_DESCRIPTION = str(Placeholder.DESCRIPTIVE_NAME)
"""Stands for a kernel's descriptive name in the text of a template."""

__all__ = [
    "DTYPE_TO_CPP",
    "KERNEL_DESCRIPTION",
    "CppTemplate",
    "CppTemplateKernel",
    "FloorDiv",
    "ModularIndexing",
    "RestartAnalysis",
    "SymbolicGridFn",
    "TritonTemplate",
    "V",
    "cexpr_index",
    "fallback_handler",
    "has_triton_package",
    "ir",
    "kernels_have_scratch",
    "lowerings",
    "ops",
    "parallel_num_threads",
    "pick_vec_isa",
    "register_lowering",
]


def kernels_have_scratch() -> bool:
    """Whether each program of a kernel gets the scratch memory that its tensor descriptors are written to.

    Before torch 2.13, the C++ wrapper allocates for one program what all of them write to.
    """
    major, minor = map(int, torch.__version__.split(".")[:2])
    return not V.graph.cpp_wrapper or (major, minor) >= (2, 13)


# ---- Inductor without its device (mock_gpu, offline) -----------------------------------------------


@contextlib.contextmanager
def pretend_device(
    properties: Any, capability: tuple[int, int], arch: int | str, *, hip: bool
) -> Iterator[None]:
    """Torch's own view of a GPU `cuda:0` with these properties (as `torch.cuda.get_device_properties`)."""
    from torch._dynamo import device_interface

    interface = _device_interface(device_interface.CudaInterface, properties, arch)
    device_interface.get_interface_for_device("cpu")  # registers the real ones first
    onednn = vars(torch._C)["_ConvBackend"].Mkldnn
    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_capability", lambda device=None: capability),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "get_device_name", lambda device=None: properties.name),
        (torch.cuda, "current_device", lambda: 0),
        (torch.version, "hip", "6.4.0" if hip else None),
        # cuDNN's rule for output layouts is oneDNN's; a CPU-only torch knows no cuDNN.
        (torch._C, "_select_conv_backend", lambda *args, **kwargs: onednn),
        # The method asks for the device itself; the operator does not.
        (FakeTensor, "contiguous", _contiguous),
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_device)
        for where, name, value in patches:
            stack.enter_context(mock.patch.object(where, name, value))
        interfaces = {"cuda": interface, "cuda:0": interface}
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, interfaces))
        _forget_device()
        yield


def _contiguous(
    tensor: torch.Tensor, *, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    return tensor.clone(memory_format=memory_format)


def _device_interface(base: type, properties: Any, arch: int | str) -> type:
    class Worker:
        set_device = staticmethod(lambda device: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: properties)

    answers: dict[str, Any] = {
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "get_device_properties": lambda device=None: properties,
        "get_compute_capability": lambda device=None: arch,
        "get_multi_processor_count": lambda device=None: properties.multi_processor_count,
        "is_bf16_supported": lambda including_emulation=False: True,
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "exchange_device": lambda device: 0,
        "maybe_exchange_device": lambda device: 0,
        "memory_allocated": lambda device=None: 0,
        "get_raw_stream": lambda device: 0,
    }
    members = {name: staticmethod(answer) for name, answer in answers.items()}
    return type("PretendedCuda", (base,), {"Worker": Worker, **members})


def _forget_device() -> None:
    """Clears what torch remembers about the device: caches of pure functions, filled anew when asked."""
    import torch._inductor.utils
    import torch.utils._triton
    from torch._inductor.runtime.hints import DeviceProperties

    remembered = [*vars(torch._inductor.utils).values(), *vars(torch.utils._triton).values()]
    for function in (*remembered, DeviceProperties.create):
        clear = getattr(getattr(function, "__func__", function), "cache_clear", None)
        if callable(clear) and not isinstance(function, type):
            clear()


def decompose(gm: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """The functional graph over core operators that Inductor lowers, as AOTAutograd and joint passes make it.

    Args:
        gm: takes and returns flat tuples of tensors, all attributes lifted to inputs.
        inputs: fake tensors on the CPU: fake CUDA tensors cannot be functionalized by a CPU-only torch.
    """
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    decompositions = dict(select_decomp_table())
    # An extern kernel on every device; it would become the CPU's own chain of operators.
    decompositions.pop(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, None)
    with torch.no_grad():
        # Run node by node: kernels are named for the operators that they come from.
        run = torch.fx.Interpreter(gm).run
        with torch.fx.traceback.preserve_node_meta():
            graph = aot_export_joint_simple(
                run, tuple(inputs), trace_joint=False, decompositions=decompositions
            )
        assert isinstance(graph, GraphModule)
        outputs: Any = graph.graph.output_node()
        # Layout optimization must not change what the caller gets.
        values = [node.meta["val"] for node in outputs.args[0]]
        outputs.meta["user_visible_output_idxs"] = list(range(len(values)))
        outputs.meta["original_output_strides"] = [value.stride() for value in values]
        with V.set_fake_mode(inputs[0].fake_mode):
            return joint_graph_passes(graph)


def propagate(gm: GraphModule, fake_mode: Any, inputs: Sequence[Any]) -> None:
    """Records in `meta["val"]` what every node computes from these fake inputs."""
    with torch.no_grad():
        FakeTensorProp(gm, fake_mode).propagate_dont_convert_inputs(*inputs)


def wants_channels_last(gm: GraphModule, config: Mapping[str, Any]) -> bool:
    """Whether Inductor would lay out convolutions channels-last; reads what `propagate` recorded."""
    with inductor_config.patch(dict(config)):
        return bool(GraphLowering.decide_layout_opt(gm, is_inference=True))


def generate_code(gm: GraphModule, fake_mode: Any, inputs: Sequence[Any], config: Mapping[str, Any]) -> str:
    """Inductor's Python wrapper, kernels included, for a graph from `decompose`.

    Args:
        inputs: fake tensors on the target device; where there is none, under `pretend_device`.
        config: Inductor options.
    """
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape

    options = {"compile_threads": 1, "fx_graph_cache": False, **config}
    with torch.no_grad(), inductor_config.patch(options), V.set_fake_mode(fake_mode):
        view_to_reshape(gm)
        propagate(gm, fake_mode, inputs)
        post_grad_passes(gm, is_inference=True)
        graph = GraphLowering(
            gm, example_inputs=list(inputs), shape_env=fake_mode.shape_env, is_inference=True
        )
        graph.freeze_runtime_asserts()
        with V.set_debug_handler(DebugContext()), V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
            graph.run(*inputs)
            return str(graph.codegen()[0].value)


@contextlib.contextmanager
def loading_kernels() -> Iterator[Callable[[Any], dict[str, Any]]]:
    """For executing modules of Triton kernels (under `pretend_device`): gives a function that describes one.

    The description is what Inductor would compile: the first of its configurations.
    """
    from torch._inductor.runtime import triton_helpers

    def describe(autotuner: Any) -> dict[str, Any]:
        config = autotuner.configs[0]
        meta = autotuner._create_compile_meta(config)
        kind = getattr(autotuner.heuristic_type, "name", str(autotuner.heuristic_type)).lower()
        return {
            "jit_function": autotuner.fn,
            "kind": kind,
            "signature": dict(meta["signature"]),
            "constants": dict(meta["constants"]),
            "tuned": tuple(config.kwargs),
            "attributes": meta["configs"][0],
            "options": autotuner._create_compile_options(config, meta),
            "inductor_meta": autotuner.inductor_meta,
        }

    # Autotuners would set the process's Triton cache folder.
    environment = mock.patch.dict(
        os.environ, {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", "unused")}
    )
    with environment, mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None):
        yield describe


def kernel_grid(
    meta: Mapping[str, Any], constants: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[int, int, int]:
    """The grid that Inductor's launcher computes, from a kernel's `inductor_meta`."""
    from torch._inductor.runtime.triton_heuristics import GridExpr

    x, y, z = GridExpr.from_meta(dict(meta), dict(constants)).eval_slow({**arguments, **constants})
    return int(x), int(y), int(z)


def is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def fake_mode_for(values: Iterable[Any]) -> Any:
    """The fake mode of the first fake tensor, or a new one."""
    found = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    return found or FakeTensorMode(shape_env=ShapeEnv())


def fake_on(device: torch.device, value: Any, fake_mode: Any) -> Any:
    """A fake tensor like `value`, on a device that need not exist; other values as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    with fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def retarget(gm: GraphModule, device: torch.device) -> None:
    """Has every operator of `gm` that names a device name this one."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in gm.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, moved)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, moved)
    gm.recompile()
