"""Short cuts through Triton's interpreter, which else spends its time on types rather than numbers.

Operands of one type skip the checks, promotions and broadcasts of the language; every other case takes the
interpreter's own way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or}
_COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


def shortcuts() -> Iterator[tuple[Any, str, Any]]:
    """`(owner, name, value)` of attributes to patch while kernels are interpreted."""
    import triton.language as tl
    from triton.runtime import interpreter

    yield interpreter, "_get_np_dtype", _cached_by_name(interpreter._get_np_dtype)
    yield tl.core.block_type, "__init__", _block_type_init(tl.core.block_type.__init__)
    yield tl.tensor, "__init__", _tensor_init
    for table, to_bool in ((_BINARY, False), (_COMPARE, True)):
        for name, function in table.items():
            method = f"__{name}__"
            yield tl.tensor, method, _operator(function, getattr(tl.tensor, method), to_bool)
    for name in ("add", "mul"):  # the order of operands does not matter
        method = f"__r{name}__"
        yield tl.tensor, method, _operator(_BINARY[name], getattr(tl.tensor, method), False)


def _cached_by_name(numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def lookup(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = numpy_dtype(dtype)
        return known[dtype.name]

    return lookup


def _block_type_init(original: Callable[..., None]) -> Callable[..., None]:
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, tuple(getattr(size, "value", size) for size in shape))
        if key not in known:
            original(self, element_ty, shape)
            known[key] = {k: v for k, v in vars(self).items() if k != "element_ty"}
        self.__dict__.update(known[key])
        self.element_ty = element_ty

    return init


@functools.lru_cache(maxsize=4096)
def _shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    import triton.language as tl

    numel = 1
    for size in sizes:
        numel *= size
    return tl.constexpr(numel), tl.core.tuple([tl.constexpr(size) for size in sizes])


def _tensor_init(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _shape(tuple(type.shape) if type.is_block() else ())


def _operator(function: Any, original: Callable[..., Any], to_bool: bool) -> Callable[..., Any]:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    limits = {"int32": 2**31, "int64": 2**63}
    logical = function in (np.bitwise_and, np.bitwise_or)
    plain = {"int32", "int64"} | ({"int1"} if logical else {"fp32"})

    def operate(self: Any, other: Any, **kwargs: Any) -> Any:
        name = self.dtype.name
        if type(other) is tl.tensor:
            kind = other.dtype.name
            if not _broadcasts(self, other):
                return original(self, other, **kwargs)
            if name == kind and name in plain:
                return result(self, other, function(self.handle.data, other.handle.data))
            if function is np.add and kind in limits and self.dtype.is_ptr():
                width = max(1, self.dtype.element_ty.primitive_bitwidth // 8)
                return result(self, other, self.handle.data + width * other.handle.data.astype(np.uint64))
        elif type(other) is int and name in limits and -limits[name] <= other < limits[name]:
            return result(self, self, function(self.handle.data, self.handle.data.dtype.type(other)))
        return original(self, other, **kwargs)

    def result(left: Any, right: Any, data: Any) -> Any:
        dtype = tl.int1 if to_bool else left.dtype
        if not left.type.is_block() and not right.type.is_block():
            return tl.tensor(TensorHandle(data, dtype), dtype)
        if not to_bool and left.type.is_block() and tuple(left.type.shape) == data.shape:
            return tl.tensor(TensorHandle(data, dtype), left.type)
        return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)))

    return operate


def _broadcasts(left: Any, right: Any) -> bool:
    """Whether numpy broadcasts these as Triton does: as many dimensions, or a scalar."""
    if left.type.is_block() and right.type.is_block():
        return len(left.type.shape) == len(right.type.shape)
    return True
