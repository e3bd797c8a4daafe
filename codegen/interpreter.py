"""Runs Triton kernels on CPU tensors, with Triton's interpreter.

Triton's own switch, TRITON_INTERPRET, must be set before anything imports Triton, and turns compilation off
for the whole process. Here kernels are interpreted one at a time, and the rest of Triton stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from .interpreter_speed import shortcuts


def interpret(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    grid: tuple[int, int, int],
) -> None:
    """Runs every program of `grid`, one after the other; results are stored into the tensors given.

    Args:
        function: the Python function below `@triton.jit`.
        arguments: CPU tensors and numbers by parameter name.
        constants: the `tl.constexpr` parameters.
    """
    from triton.runtime import interpreter

    run = interpreter.InterpretedFunction(function).rewrite()
    values = {name: interpreter._implicit_cvt(value) for name, value in arguments.items()}
    builder = interpreter.interpreter_builder
    with interpreted_language(), mock.patch.dict(function.__globals__, libdevice=Libdevice()):
        builder.set_grid_dim(*grid)
        for index in itertools.product(*map(range, grid)):
            builder.set_grid_idx(*index)
            run(**values, **constants)


@contextlib.contextmanager
def interpreted_language() -> Iterator[None]:
    """Within this context the functions of `triton.language`, and jitted functions, compute with numpy."""
    import triton.language as tl
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    builder = interpreter.InterpreterBuilder
    # Kernels are compiled without overflow checks, too; they would take most of the time here.
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    language = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    with contextlib.ExitStack() as stack:
        scope = interpreter._patch_lang(language)
        stack.callback(scope.restore)
        for owner, name, value in (
            (JITFunction, "__call__", _call_helper),
            (interpreter.interpreter_builder, "options", options),
            (builder, "create_dot", _dot),
            (builder, "get_bf16", lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)),
            (builder, "cast_impl", _cast(builder.cast_impl)),
            (builder, "binary_op", _arithmetic(builder.binary_op)),
            (builder, "unary_op", _arithmetic(builder.unary_op)),
            (tl.tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0])),
            (tl, "reduce", _reduce),
            (tl.core, "reduce", _reduce),
            (triton_helpers, "libdevice", Libdevice()),
            *shortcuts(),
        ):
            stack.enter_context(
                mock.patch.object(owner, name, value, create=name == "get_bf16")
            )  # new in 3.9
        # Divisions by a masked-out zero and the like are the kernel's business.
        stack.enter_context(np.errstate(all="ignore"))
        yield


def _call_helper(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A jitted function called by a kernel. The interpreter's own version patches the language for good."""
    return _rewritten(self.fn)(*args, **kwargs)


@functools.cache
def _rewritten(function: Callable[..., Any]) -> Callable[..., Any]:
    from triton.runtime import interpreter

    return interpreter.InterpretedFunction(function).rewrite()


# ---- bfloat16: the interpreter holds its bits in uint16, and multiplies them as if they were numbers ---


def _to_float32(handle: Any) -> np.ndarray[Any, Any]:
    import triton.language as tl

    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _to_bfloat16(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rounds to nearest, ties to even, as the hardware does."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16).reshape(data.shape)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    if d.data.dtype != np.float32:  # integers, float64
        return TensorHandle(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)
    return TensorHandle(np.matmul(_to_float32(a), _to_float32(b)) + d.data, d.dtype.scalar)


def _arithmetic(original: Callable[..., Any]) -> Callable[..., Any]:
    """`binary_op` or `unary_op`, rounding each result of a bfloat16 operation."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def operate(self: Any, *operands: Any) -> Any:
        *handles, function = operands
        if handles[0].dtype.scalar != tl.bfloat16 or handles[0].data.dtype != np.uint16:
            return original(self, *operands)
        result = function(*map(_to_float32, handles))
        return TensorHandle(result if result.dtype == np.bool_ else _to_bfloat16(result), tl.bfloat16)

    return operate


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        old, new = source.dtype.scalar, dtype.scalar
        if source.data.dtype == np.bool_:  # comparisons still carry the type of what was compared
            old = tl.int1
        if old == new == tl.bfloat16:
            return source
        if new == tl.bfloat16:
            return TensorHandle(_to_bfloat16(source.data.astype(np.float32)), new)
        if old == tl.bfloat16:
            return TensorHandle(_to_float32(source).astype(_get_np_dtype(dtype)), new)
        if old == tl.int1:
            return TensorHandle(source.data.astype(_get_np_dtype(dtype)), new)
        return original(self, source, dtype)

    return cast_impl


# ---- reductions: the interpreter calls the combining function once per number -------------------------


def _reduce(input: Any, axis: Any, combine_fn: Any, keep_dims: bool = False, **_: Any) -> Any:
    """`tl.reduce`, halving the axis: neighbours are combined, as whole arrays."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    single = not isinstance(input, tuple | tl.core.tuple)
    axis = getattr(axis, "value", axis)
    parts = [part.handle.data for part in ((input,) if single else input)]
    dtypes = [part.dtype for part in ((input,) if single else input)]
    ndim = parts[0].ndim
    if axis is None:
        parts, axis = [part.reshape(-1) for part in parts], 0
    parts = [np.moveaxis(part, axis, -1) for part in parts]

    def tensor(data: Any, dtype: Any) -> Any:
        if data.ndim == 0:
            return tl.tensor(TensorHandle(data.reshape(1), dtype), dtype)
        return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)))

    while parts[0].shape[-1] > 1:
        even = [tensor(part[..., 0::2], dtype) for part, dtype in zip(parts, dtypes, strict=True)]
        odd = [tensor(part[..., 1::2], dtype) for part, dtype in zip(parts, dtypes, strict=True)]
        combined = combine_fn(*even, *odd)
        combined = combined if isinstance(combined, tuple | tl.core.tuple) else (combined,)
        parts = [
            np.broadcast_to(value.handle.data, even[0].handle.data.shape).astype(part.dtype)
            for value, part in zip(combined, parts, strict=True)
        ]
    parts = [part[..., 0] for part in parts]
    if keep_dims:
        axes = range(ndim) if parts[0].ndim == 0 else (axis,)
        parts = [np.expand_dims(part, tuple(axes)) for part in parts]
    results = tuple(tensor(part, dtype) for part, dtype in zip(parts, dtypes, strict=True))
    return results[0] if single else results


# ---- libdevice -----------------------------------------------------------------------------------------

_OTHER_NAMES = {
    "abs": torch.abs,
    "fabs": torch.abs,
    "rint": torch.round,
    "nearbyint": torch.round,
    "llrint": torch.round,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isfinited": torch.isfinite,
    "finitef": torch.isfinite,
    "signbit": torch.signbit,
    "atan2": torch.atan2,
    "pow": torch.pow,
    "fmod": torch.fmod,
    "exp10": lambda x: torch.pow(10.0, x),
    "log2": torch.log2,
    "cbrt": lambda x: torch.sign(x) * torch.abs(x).pow(1 / 3),
    "fast_expf": torch.exp,
    "fast_dividef": torch.div,
    "div_rn": torch.div,
    "tgamma": lambda x: torch.exp(torch.lgamma(x)),
    "j0": torch.special.bessel_j0,
    "j1": torch.special.bessel_j1,
    "cyl_bessel_i0": torch.special.i0,
    "cyl_bessel_i1": torch.special.i1,
}


class Libdevice:
    """The functions of NVIDIA's (and AMD's) math library that Inductor calls, computed by torch."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        function = _OTHER_NAMES.get(name) or getattr(torch, name, None) or getattr(torch.special, name, None)
        if function is None:
            raise AttributeError(f"libdevice.{name} is not known to the interpreter")
        return functools.partial(_elementwise, function)


def _elementwise(function: Callable[..., Any], *args: Any) -> Any:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    tensors = [_to_torch(arg) for arg in args]
    dtype = next(arg.dtype for arg in args if hasattr(arg, "handle"))
    result = function(*tensors)
    if result.dtype == torch.bool:
        dtype = tl.int1
    data = result.numpy().astype(_get_np_dtype(dtype))
    is_block = any(hasattr(arg, "handle") and arg.type.is_block() for arg in args)
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)) if is_block else dtype)


def _to_torch(value: Any) -> Tensor:
    if not hasattr(value, "handle"):
        return torch.tensor(getattr(value, "value", value))
    return torch.from_numpy(np.ascontiguousarray(value.handle.data))
