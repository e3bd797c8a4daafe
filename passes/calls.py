"""Reads a convolution, linear or batch-norm node, whatever dialect it is written in.

Dynamo graphs call torch functions (`torch.conv2d`), exported graphs call ATen overloads
(`aten.conv2d.default`, `aten.conv2d.padding`, `aten.convolution.default`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .. import padded_conv as _padded_conv  # noqa: F401  registers an operator

aten = torch.ops.aten

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_CONVOLUTION = (*_CONV[:6], "transposed", "output_padding", "groups")
_LINEAR = ("input", "weight", "bias")
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_ATEN_BATCH_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")

# target -> (number of spatial dimensions or None when the arguments tell, transposed, argument names)
_LAYERS: dict[Any, tuple[int | None, bool, tuple[str, ...]]] = {
    torch._C._nn.linear: (0, False, _LINEAR),
    torch.ops.blocksparse.padded_conv2d.default: (2, False, _CONV),
    aten.linear.default: (0, False, _LINEAR),
    aten.convolution.default: (None, False, _CONVOLUTION),
}
for _n in (1, 2, 3):
    _conv, _transpose = f"conv{_n}d", f"conv_transpose{_n}d"
    _LAYERS[getattr(torch, _conv)] = (_n, False, _CONV)
    _LAYERS[getattr(aten, _conv).default] = (_n, False, _CONV)
    _LAYERS[getattr(aten, _conv).padding] = (_n, False, _CONV)
    _LAYERS[getattr(torch, _transpose)] = (_n, True, _CONV_TRANSPOSE)
    _packet = getattr(aten, _transpose)
    for _overload in _packet.overloads():
        if not _overload.endswith("out"):
            _LAYERS[getattr(_packet, _overload)] = (_n, True, _CONV_TRANSPOSE)

_NORMS: dict[Any, tuple[str, ...]] = {
    torch.nn.functional.batch_norm: _BATCH_NORM,
    torch.batch_norm: _ATEN_BATCH_NORM,
    aten.batch_norm.default: _ATEN_BATCH_NORM,
    aten.cudnn_batch_norm.default: _ATEN_BATCH_NORM,
    aten._native_batch_norm_legit_no_training.default: (*_ATEN_BATCH_NORM[:5], "momentum", "eps"),
}


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one conv/linear node, normalised.

    `padding` is `(before, after)` per spatial dimension; `input`, `weight` and `bias` are FX nodes.
    """

    node: Node
    spatial_dims: int
    transposed: bool
    input: Node
    weight: Node
    bias: Node | None
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int

    @property
    def op(self) -> str:
        if not self.spatial_dims:
            return "linear"
        return f"conv{'_transpose' if self.transposed else ''}{self.spatial_dims}d"


@dataclass(frozen=True)
class NormCall:
    """The arguments of one inference-mode batch norm; `weight` and `bias` may be absent."""

    node: Node
    input: Node
    mean: Node
    var: Node
    weight: Node | None
    bias: Node | None
    eps: float


def layer_call(node: Node) -> LayerCall | None:
    """`node` as a `LayerCall`, or None if it is no conv/linear or its arguments are not static."""
    if node.op != "call_function" or node.target not in _LAYERS:
        return None
    dims, transposed, names = _LAYERS[node.target]
    args = _bind(node, names)
    weight, bias = args.get("weight"), args.get("bias")
    if not isinstance(args.get("input"), Node) or not isinstance(weight, Node):
        return None
    if dims is None:
        dims, transposed = len(args["stride"]), bool(args["transposed"])
    if not dims:
        return LayerCall(node, 0, False, args["input"], weight, bias, (), (), (), (), 1)
    shape = tensor_meta(weight)
    if shape is None:
        return None
    kernel = tuple(shape.shape[2:])
    stride, dilation = (_per_dim(args.get(key, 1), dims) for key in ("stride", "dilation"))
    output_padding = _per_dim(args.get("output_padding", 0), dims)
    padding = _padding(args.get("padding", 0), dims, kernel, dilation)
    numbers = (stride, dilation, output_padding, padding, (args.get("groups", 1),))
    if any(value is None or any(not _is_static(v) for v in value) for value in numbers):
        return None
    assert stride is not None and padding is not None and dilation is not None and output_padding is not None
    return LayerCall(
        node, dims, transposed, args["input"], weight, bias,
        stride, padding, dilation, output_padding, int(args.get("groups", 1)),
    )  # fmt: skip


def norm_call(node: Node) -> NormCall | None:
    """`node` as a `NormCall`, or None if it is not a batch norm in inference mode."""
    if node.op != "call_function" or node.target not in _NORMS:
        return None
    args = _bind(node, _NORMS[node.target])
    eps = args.get("eps", 1e-5)
    mean, var = args.get("running_mean"), args.get("running_var")
    if args.get("training", False) or mean is None or var is None or not isinstance(eps, int | float):
        return None
    return NormCall(node, args["input"], mean, var, args.get("weight"), args.get("bias"), float(eps))


def tensor_meta(node: Node) -> torch.Tensor | None:
    """The fake tensor that tracing recorded for `node`."""
    value = node.meta.get("val", node.meta.get("example_value"))
    return value if isinstance(value, torch.Tensor) else None


def size_of(size: int | torch.SymInt) -> int | str:
    """A size as a `Site` has it: a string where it is symbolic."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else str(expression)


def op_name(node: Node) -> str:
    """What `node` calls, in any dialect: `relu` for `torch.relu`, `aten.relu.default` and `x.relu()`."""
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.split(".")[0]


def layer_name(node: Node) -> str:
    """The qualified name of the module that `node` came from, or the node's own name."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    return module_path(next(reversed(stack.values()))[0]) or node.name


def module_path(source: str) -> str:
    """The qualified name in Dynamo's expression for a module, whatever variable it was reached through.

    `L['self'].layer1.0.conv`, `L['function'].__closure__[0].cell_contents.layer1.0.conv` → `layer1.0.conv`
    """
    path = re.sub(r"_modules\['(\w+)'\]", r"\1", source)
    path = re.sub(r"^.*cell_contents", "", path)
    return re.sub(r"^[LG]\['\w+'\]", "", path).strip(".")


def _bind(node: Node, names: Sequence[str]) -> dict[str, Any]:
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _per_dim(value: Any, dims: int) -> tuple[Any, ...] | None:
    if isinstance(value, int | Node | torch.SymInt):
        return (value,) * dims
    value = tuple(value)
    return value * dims if len(value) == 1 else value


def _padding(
    value: Any, dims: int, kernel: Sequence[int], dilation: Sequence[int] | None
) -> tuple[tuple[int, int], ...] | None:
    if value == "valid":
        return ((0, 0),) * dims
    if value == "same":
        if dilation is None:
            return None
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((r // 2, r - r // 2) for r in reach)
    if dims > 1 and isinstance(value, list | tuple) and len(value) == 2 * dims:  # of padded_conv2d
        return tuple(zip(value[::2], value[1::2], strict=True))
    each = _per_dim(value, dims)
    return None if each is None else tuple((p, p) for p in each)


def _is_static(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_static(v) for v in value)
    return isinstance(value, int)


def is_call(node: Any, targets: Sequence[Callable[..., Any]]) -> bool:
    """Whether `node` calls one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets
