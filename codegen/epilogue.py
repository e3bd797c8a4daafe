"""Inductor's pointwise epilogue on one register tile of a `[pixels, channels]` matrix."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from .inductor_api import FloorDiv, ModularIndexing, ir, ops

_COSTLY = ("erf", "exp", "tanh", "log", "sigmoid", "pow", "sin", "cos", "sqrt", " / ")
"""Where an epilogue computes one of these, unrolling it over the tile costs code and gains nothing."""


_FOR = re.compile(r"\bfor\s*\(")
_LITERAL_FOR = re.compile(
    r"\bfor\s*\(int64_t (x\d+)=static_cast<int64_t>\(0L\); \1<static_cast<int64_t>\((\d+)L\); "
    r"\1\+=static_cast<int64_t>\((\d+)L\)\)"
)
_MOST_COPIES = 64


_TO_BF16 = re.compile(r"\bat::vec::convert<at::BFloat16(?:,1,float,2)?>\(")


def round_natively(code: str) -> str:
    """Rounds to bf16 by the CPU's own instruction where torch emulates it (`to_bf16` in epilogue.h)."""
    return _TO_BF16.sub("block_sparse::to_bf16(", code)


_NUMBER = re.compile(
    r"auto (tmp\d+) = static_cast<float>\([-\d.]+\);\s+auto (tmp\d+) = at::vec::Vectorized<float>\(\1\);"
)
_BOUND = re.compile(r"at::vec::(max|min)imum\((tmp\d+), (tmp\d+)\)")
_TO_BYTES = re.compile(
    r"auto (tmp\d+) = at::vec::clamp_max\(([^;]+);(\s+auto tmp\d+ = )at::vec::convert<(u?int8_t)>\(\1\)"
)


def clamp_natively(code: str) -> str:
    """Clamps between numbers, as in quantizing, with one instruction for each bound.

    Inductor's `maximum` looks for NaN in both operands; `clamp_min` gives NaN for NaN, too, if the bound is
    none. Bytes made of numbers so clamped need no bounds of their own (`to_bytes` in epilogue.h).
    """
    numbers = {name for _, name in _NUMBER.findall(code)}

    def clamp(call: re.Match[str]) -> str:
        kind, value, bound = call.groups()
        return (
            f"at::vec::clamp_{'min' if kind == 'max' else 'max'}({value}, {bound})"
            if bound in numbers
            else call[0]
        )

    return _TO_BYTES.sub(
        r"auto \1 = at::vec::clamp_max(\2;\3block_sparse::to_bytes<\4>(\1)", _BOUND.sub(clamp, code)
    )


_PART = r", static_cast<int64_t>\((\d+)L?\)\);$"
_LOAD_PART = re.compile(r"at::vec::Vectorized<([\w:]+)>::loadu\((.*)" + _PART, re.MULTILINE)
_STORE_PART = re.compile(r"\b(tmp\d+)\.store\((.*)" + _PART, re.MULTILINE)


def move_parts_natively(code: str) -> str:
    """Moves parts of vectors by instructions of their width (`load_part` and `store_part` in epilogue.h)."""
    code = _LOAD_PART.sub(r"block_sparse::load_part<\1, \3>(\2);", code)
    return _STORE_PART.sub(r"block_sparse::store_part<\3>(\1, \2);", code)


def unroll(code: str) -> str:
    """Unrolls the loops over the tile, so that the C++ compiler can keep the tile in registers.

    Left alone: loops whose length is not a literal, loops over single elements (what Inductor could not
    vectorise), and costly bodies.
    """
    loops = _LITERAL_FOR.findall(code)
    copies = math.prod(-(-int(end) // int(step)) for _, end, step in loops)
    costly = any(name in code for name in (*_COSTLY, "#pragma omp"))
    if costly or copies > _MOST_COPIES or len(loops) != len(_FOR.findall(code)):
        return code
    code = code.replace("#pragma GCC ivdep", "")
    return _LITERAL_FOR.sub(rf"\n#pragma GCC unroll {_MOST_COPIES}\n\g<0>", code)


def raw_output(out: Any) -> tuple[Any, Any]:
    """The raw tile under a name of its own, and the node that copies it to the template's buffer.

    The raw tile is never materialised: the kernel's local buffer of fp32 sums stands for it.
    """
    size, stride = out.get_size(), out.get_layout().stride
    layout = ir.FixedLayout(out.get_device(), torch.float32, size, stride)
    raw = ir.Buffer(name=f"{out.get_name()}_raw", layout=layout)
    data = ir.Pointwise(
        device=out.get_device(),
        dtype=out.get_dtype(),
        inner_fn=_rounded(raw.make_loader(), out.get_dtype()),
        ranges=out.get_size(),
    )
    return raw, ir.ComputedBuffer(name=out.get_name(), layout=out.get_layout(), data=data)


def _rounded(loader: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """The loader of an fp32 buffer, with what it loads as `dtype`."""
    return loader if dtype == torch.float32 else lambda index: ops.to_dtype(loader(index), dtype)


@dataclass(frozen=True)
class FusedEpilogue:
    """What a template computes and what Inductor fused behind it.

    Attributes:
        raw: stands for the kernel's local buffer, before the epilogue.
        nodes: the epilogue's nodes; the first copies `raw` to the template's own buffer.
        result: what is stored.
        outputs: the kernel's output arguments by name: `Y`, and `Raw` if others read the template's buffer.
        aliases: buffers whose place another one takes.
    """

    raw: Any
    nodes: list[Any]
    result: Any
    outputs: dict[str, Any]
    aliases: dict[str, str]

    @classmethod
    def of(cls, out: Any, behind: Sequence[Any] | None, out_has_other_users: bool | None) -> FusedEpilogue:
        """Of a template with the output node `out`, and the nodes fused behind it."""
        raw, copy = raw_output(out)
        if not behind:
            return cls(raw, [copy], out, {"Y": out}, {raw.get_name(): out.get_name()})
        result = behind[-1]
        outputs, aliases = {"Y": result}, {raw.get_name(): result.get_name()}
        if out_has_other_users:
            outputs["Raw"] = out
        else:
            aliases[out.get_name()] = result.get_name()
        return cls(raw, [copy, *behind], result, outputs, aliases)


def as_matrix(buffer: Any, pixels: Any, channels: Any) -> Any:
    """A buffer that lies in memory as a contiguous matrix, viewed as that."""
    layout = ir.FixedLayout(buffer.get_device(), buffer.get_dtype(), [pixels, channels], [channels, 1])
    return ir.ReinterpretView(data=buffer, layout=layout)


def flipped(matrix: Any) -> Any:
    """A matrix with its rows as columns, as the same memory.

    Of a tile one row high, Inductor would take the loop over rows for that over columns, and not vectorise.
    """
    layout = matrix.get_layout()
    size, stride = layout.size[::-1], layout.stride[::-1]
    layout = ir.FixedLayout(layout.device, layout.dtype, size, stride, layout.offset)
    if isinstance(matrix, ir.ReinterpretView):
        return ir.ReinterpretView(data=matrix.data, layout=layout)
    return ir.Buffer(name=matrix.get_name(), layout=layout)


def flipped_index(reindex: Callable[[Sequence[Any]], list[Any]]) -> Callable[[Sequence[Any]], list[Any]]:
    """A `reindexer` for flipped matrices."""
    return lambda index: reindex(index[::-1])


def reindexer(node: Any, pixels: Any, channels: Any) -> Callable[[Sequence[Any]], list[Any]]:
    """Maps `[pixel, channel]` to the index of an epilogue node that lies in memory as that matrix."""
    sizes, strides = node.get_size(), node.get_layout().stride
    order = sorted((d for d in range(len(sizes)) if sizes[d] != 1), key=lambda d: -_typical(strides[d]))
    ordered = [sizes[d] for d in order]
    # Where the node's dimensions split at the channels, no index needs a division by their number.
    splits = (i for i in range(len(order) + 1) if sympy.prod(ordered[i:]) == channels)
    split = next(splits, None)

    def reindex(index: Sequence[Any]) -> list[Any]:
        pixel, channel = index
        if split is None:
            parts = _unflatten(pixel * channels + channel, ordered)
        else:
            parts = _unflatten(pixel, ordered[:split]) + _unflatten(channel, ordered[split:])
        result = [sympy.Integer(0)] * len(sizes)
        for d, part in zip(order, parts, strict=True):
            result[d] = part
        return result

    return reindex


def _typical(size: Any) -> int:
    """A value that orders the strides of a dense layout: every symbol stands for a large number."""
    size = sympy.sympify(size)
    return int(size.subs(dict.fromkeys(size.free_symbols, 1009)))


def _unflatten(index: Any, sizes: Sequence[Any]) -> list[Any]:
    """The index into a contiguous array of these sizes."""
    result = []
    for i in range(len(sizes)):
        inner = sympy.prod(sizes[i + 1 :])
        result.append(FloorDiv(index, inner) if i == 0 else ModularIndexing(index, inner, sizes[i]))
    return result
