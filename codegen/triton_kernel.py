"""One Triton kernel as Inductor wrote it: loaded, run by the interpreter, cross-compiled."""

from __future__ import annotations

import functools
import linecache
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .cross_compile import CompiledKernel, compile_kernel
from .inductor_api import kernel_grid, loading_kernels
from .interpreter import interpret
from .mock_gpu import GpuTarget, gpu_target, mock_gpu

MOST_ELEMENTS = 1 << 15
"""Elements of one program in the interpreter, whose cost is per program rather than per element."""


@dataclass(frozen=True)
class TritonKernel:
    """A kernel of an `OfflineProgram`. Small and picklable: what is derived from `text` is loaded on demand.

    Args:
        name: its function.
        text: source of the module that Inductor would compile it from.
        target: the GPU it was generated for.
        nodes, ops: the FX nodes it computes, and their operators (`aten.relu.default`), in graph order.
        layers: qualified names of the layers whose weights it reads, one or more for each launch.
        calls: for each launch, the source of its arguments in the wrapper.
    """

    name: str
    text: str
    target: GpuTarget
    nodes: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    calls: tuple[tuple[str, ...], ...] = field(default=(), repr=False)

    @property
    def source(self) -> str:
        """The kernel function alone, as Triton text."""
        return self.text[self.text.index("@triton.jit") :].strip() + "\n"

    @property
    def kind(self) -> str:
        """`template`, `pointwise`, `reduction`, `persistent_reduction` …"""
        return _load(self.name, self.text, self.target).kind

    @property
    def is_template(self) -> bool:
        return self.kind == "template"

    @property
    def signature(self) -> dict[str, str]:
        """Triton type by parameter name: `*bf16`, `i32`, `constexpr`."""
        return dict(_load(self.name, self.text, self.target).signature)

    @property
    def constants(self) -> dict[str, Any]:
        """Values of the `tl.constexpr` parameters, as compiled for the GPU."""
        return dict(_load(self.name, self.text, self.target).constants)

    @property
    def num_warps(self) -> int:
        return int(_load(self.name, self.text, self.target).options["num_warps"])

    @property
    def num_stages(self) -> int:
        return int(_load(self.name, self.text, self.target).options["num_stages"])

    def grid(self, *arguments: Any) -> tuple[int, int, int]:
        """Programs of a launch with these arguments (those of the wrapper's call)."""
        loaded = _load(self.name, self.text, self.target)
        return kernel_grid(loaded.inductor_meta, loaded.constants, loaded.bind(arguments))

    def run(self, *arguments: Any, **_: Any) -> None:
        """Runs the kernel on CPU tensors, in Triton's interpreter. Takes what the wrapper passes."""
        loaded = _load(self.name, self.text, self.target)
        values = loaded.bind(arguments)
        constants = {**loaded.constants, **_large_blocks(loaded.constants, values, loaded.inductor_meta)}
        grid = kernel_grid(loaded.inductor_meta, constants, values)
        constants = {k: v for k, v in constants.items() if k in loaded.signature}
        parameters = {k: v for k, v in values.items() if k in loaded.signature and k not in constants}
        interpret(loaded.function, parameters, constants, grid)

    def compile(self, target: str | GpuTarget | None = None) -> CompiledKernel:
        """Machine code for the target, made without the GPU.

        Args:
            target: another target than the one the text was generated for. Its numbers (warps, stages) stay.

        Raises:
            OptionError: for an unknown target.
        """
        wanted = self.target if target is None else gpu_target(target)
        loaded = _load(self.name, self.text, wanted)
        return compile_kernel(
            loaded.jit_function, loaded.signature, loaded.constants, loaded.attributes, loaded.options, wanted
        )


@dataclass(frozen=True)
class _Loaded:
    """What executing a kernel's module gives; `tuned` are the constants that launches leave out."""

    jit_function: Any
    kind: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    tuned: tuple[str, ...]
    attributes: Any
    options: Mapping[str, Any]
    inductor_meta: Mapping[str, Any]

    @property
    def function(self) -> Callable[..., Any]:
        return self.jit_function.fn  # type: ignore[no-any-return]

    def bind(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """Arguments of a launch by name; grid sizes may follow the kernel's own."""
        # A size of 1 is a constant of the kernel, and still an argument of the launch.
        names = [name for name in self.signature if name not in self.tuned]
        names += self.inductor_meta.get("extra_launcher_args", [])
        return dict(zip(names, arguments, strict=True))


@functools.lru_cache(maxsize=512)
def _load(name: str, text: str, target: GpuTarget) -> _Loaded:
    file = f"{name}_{hash(text) & 0xFFFFFFFF:08x}.py"
    # Triton reads the function's source back.
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    module = types.ModuleType(name)
    module.__file__ = file
    with mock_gpu(target), loading_kernels() as describe:
        exec(compile(text, file, "exec"), module.__dict__)
        return _Loaded(**describe(module.__dict__[name]))


def _large_blocks(
    constants: Mapping[str, Any], values: Mapping[str, Any], meta: Mapping[str, Any]
) -> dict[str, int]:
    """Block sizes for the interpreter: as much of the work as `MOST_ELEMENTS` allows, in one program."""
    left = MOST_ELEMENTS
    blocks: dict[str, int] = {}
    if "grid_type" not in meta or meta["grid_type"] not in ("Grid1D", "Grid2D", "Grid3D"):
        return blocks
    for prefix in ("r0_", "r1_", "x", "y", "z"):
        name, length = f"{prefix.upper()}BLOCK", values.get(f"{prefix}numel")
        if length is None:
            continue
        size = 1 << max(0, int(length) - 1).bit_length()
        if name in constants:
            size = blocks[name] = max(1, min(size, left, 4096 if prefix != "x" else left))
        left = max(1, left // size)
    return blocks
