"""The one module that touches torch's private surface (Inductor, Dynamo, guards).

Everything else in the package imports these names from here, so that a torch release that moves
something is met in one place. Supported: torch 2.11 to 2.15.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from torch._subclasses import FakeTensor
from torch.fx import GraphModule

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

    with _best_linear_library():
        return inductor_compile_fx(gm, list(inputs), config_patches=dict(config))


def _best_linear_library() -> contextlib.AbstractContextManager[Any]:
    """Has Inductor prepack frozen fp32 linear layers with oneDNN where MKL is slow.

    Inductor takes MKL's packed product for static batch sizes, and oneDNN's for symbolic ones. On CPUs
    that are not Intel's, MKL runs at less than half of oneDNN's rate (measured on Zen 5: 210 against
    500 GFLOP/s).
    """
    if not _mkl_is_slow():
        return contextlib.nullcontext()
    return mock.patch.object(torch.ops.mkldnn, "_is_mkldnn_acl_supported", lambda: True)


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
from torch._inductor.codegen.cpp_utils import cexpr_index  # noqa: E402
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
    "lowerings",
    "ops",
    "parallel_num_threads",
    "pick_vec_isa",
    "register_lowering",
]

# ---- Inductor without its device (mock_gpu, offline) -----------------------------------------------


@contextlib.contextmanager
def pretend_device(
    properties: Any, capability: tuple[int, int], arch: int | str, *, hip: bool
) -> Iterator[None]:
    """Torch's own view of a GPU `cuda:0` with these properties (as `torch.cuda.get_device_properties`)."""
    from torch._dynamo import device_interface

    interface = _device_interface(device_interface.CudaInterface, properties, arch)
    device_interface.get_interface_for_device("cpu")  # registers the real ones first
    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_capability", lambda device=None: capability),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "get_device_name", lambda device=None: properties.name),
        (torch.cuda, "current_device", lambda: 0),
        (torch.version, "hip", "6.4.0" if hip else None),
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_device)
        for where, name, value in patches:
            stack.enter_context(mock.patch.object(where, name, value))
        interfaces = {"cuda": interface, "cuda:0": interface}
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, interfaces))
        _forget_device()
        yield


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
