"""Which tensors of a graph share their channels: an order of channels holds for all of them or for none.

A *space* is the output channels of a layer, and of everything that they pass through unmixed: pointwise
functions, batch norm, pooling, depthwise convolutions, sums (which make two spaces one), concatenations
(whose channels are those of several spaces, one after the other) and flattening.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from .calls import LayerCall, NormCall, layer_call, norm_call, op_name, size_of, tensor_meta
from .static_values import StaticValues

POINTWISE = {
    "relu", "relu6", "hardtanh", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "elu", "selu",
    "celu", "mish", "softplus", "leaky_relu", "clamp", "clamp_min", "clamp_max", "abs", "neg", "exp", "sqrt",
    "rsqrt", "square", "pow", "add", "sub", "mul", "div", "truediv", "iadd", "isub", "imul", "itruediv",
    "maximum", "minimum", "where", "dropout", "feature_dropout", "contiguous", "clone", "detach", "to",
    "float", "half", "bfloat16", "double", "type_as", "_to_copy", "alias", "identity",
}  # fmt: skip
POOLS = {
    f"{kind}{dims}d"
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
    for dims in (1, 2, 3)
} | {"upsample_nearest2d", "upsample_bilinear2d", "interpolate"}
_RESHAPES = {"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"}
MEANS = {"mean", "amax", "sum"}
SIZES = {"size", "sym_size", "dim", "numel"}

Size = int | str


@dataclass(frozen=True)
class Axis:
    """Where the channels of a tensor are.

    Args:
        spaces: whose channels follow one another along the axis.
        dim: of the tensor.
        inner: neighbouring entries of the axis that belong to one channel: pixels, after flattening.
    """

    spaces: tuple[int, ...]
    dim: int
    inner: int = 1


@dataclass(frozen=True)
class Reader:
    """A layer, and the channels that its weight's rows and columns belong to; None where in no space."""

    call: LayerCall
    rows: Axis
    columns: Axis | None


@dataclass(frozen=True)
class Constant:
    """An operand with a value per channel along `dim`."""

    user: Node
    operand: Node
    dim: int
    axis: Axis


class ChannelAxes:
    """The spaces of one graph.

    Attributes:
        readers: layers whose weights can be reordered, in graph order.
        constants: operands to reorder with the channels.
        fixed: why a space has to keep its order, by space.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.readers: list[Reader] = []
        self.constants: list[Constant] = []
        self.fixed: dict[int, str] = {}
        self.sizes: list[int] = []
        self._parents: list[int] = []
        self._axes: dict[Node, Axis] = {}
        self._values = StaticValues(gm)
        for node in gm.graph.nodes:
            if node.op == "output":
                self._fix(node.all_input_nodes, "they are returned")
            elif node.op in ("call_function", "call_method", "call_module"):
                self._visit(node)

    def root(self, space: int) -> int:
        while self._parents[space] != space:
            space = self._parents[space]
        return space

    def why_fixed(self, space: int) -> str | None:
        return next((why for s, why in self.fixed.items() if self.root(s) == self.root(space)), None)

    # ---- nodes ------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        layer, norm, name = layer_call(node), norm_call(node), op_name(node)
        if layer is not None:
            axis = self._layer(layer)
        elif norm is not None:
            axis = self._norm(norm)
        elif name in ("cat", "concat"):
            axis = self._cat(node)
        elif name in POINTWISE or name.rstrip("_") in POINTWISE:
            axis = self._pointwise(node)
        else:
            axis = self._unmixed(node, name)
        if axis is not None:
            self._axes[node] = axis
        elif layer is None and name not in SIZES:
            self._fix(node.all_input_nodes, f"{name} reads them")

    def _layer(self, call: LayerCall) -> Axis | None:
        axis, x = self._axes.get(call.input), tensor_meta(call.input)
        obstacle = self._obstacle(call)
        if obstacle is not None or x is None:
            self._fix(call.node.all_input_nodes, f"{obstacle} reads them")
            return None
        if call.groups > 1:  # depthwise: each channel stays by itself
            self._constant(call.node, call.weight, 0, axis)
            self._constant(call.node, call.bias, 0, axis)
            return axis
        out_channels, in_channels = self._values.get(call.weight).shape[:2]  # type: ignore[union-attr]
        dim = 1 if call.spatial_dims else x.dim() - 1
        if axis is not None and (axis.dim != dim or self._length(axis) != in_channels):
            self._fix([call.input], "a layer reads them along another axis")
            axis = None
        rows = Axis((self._new(out_channels),), dim)
        self.readers.append(Reader(call, rows, axis))
        return rows

    def _obstacle(self, call: LayerCall) -> str | None:
        """Why the channels of a layer cannot move, as what it is."""
        axis, x = self._axes.get(call.input), tensor_meta(call.input)
        weight, bias = self._values.get(call.weight), self._values.get(call.bias)
        if weight is None or (call.bias is not None and (bias is None or bias.dim() != 1)):
            return "a layer whose weight or bias is no constant"
        if x is None or (call.spatial_dims and x.dim() != call.spatial_dims + 2):
            return "a convolution without a batch"
        if call.transposed:
            return "a transposed convolution"
        depthwise = call.groups == len(weight) and weight.shape[1] == 1
        if call.groups > 1 and not (depthwise and axis is not None and axis.dim == 1 and axis.inner == 1):
            return "a grouped convolution"
        return "a layer of constants" if axis is None and self._values.is_static(call.input) else None

    def _norm(self, norm: NormCall) -> Axis | None:
        axis = self._axes.get(norm.input)
        operands = [n for n in (norm.mean, norm.var, norm.weight, norm.bias) if isinstance(n, Node)]
        if axis is None or axis.dim != 1 or not all(map(self._values.is_static, operands)):
            return None
        for operand in operands:
            self._constant(norm.node, operand, 0, axis)
        return axis

    def _cat(self, node: Node) -> Axis | None:
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        out = tensor_meta(node)
        if out is None or not isinstance(parts, Sequence) or not isinstance(dim, int):
            return None
        nodes = [part for part in parts if isinstance(part, Node)]
        axes = [self._axes.get(part) for part in nodes]
        known = next((axis for axis in axes if axis is not None), None)
        if known is None:
            return None
        if known.dim != dim % out.dim():
            return self._merged([a for a in axes if a is not None]) if all(axes) else None
        spaces: list[int] = []
        for part, axis in zip(nodes, axes, strict=True):
            if axis is None:
                axis = self._stranger(part, known)
            if axis is None or (axis.dim, axis.inner) != (known.dim, known.inner):
                return None
            spaces += axis.spaces
        return Axis(tuple(spaces), known.dim, known.inner)

    def _stranger(self, node: Node, like: Axis) -> Axis | None:
        """A fixed space for channels from elsewhere."""
        value = tensor_meta(node)
        size = value.shape[like.dim] if value is not None and value.dim() > like.dim else None
        if not isinstance(size, int) or size % like.inner:
            return None
        space = self._new(size // like.inner)
        self.fixed[space] = "they come from outside"
        return Axis((space,), like.dim, like.inner)

    def _pointwise(self, node: Node) -> Axis | None:
        out, operands = tensor_meta(node), node.all_input_nodes
        axes = [self._axes[operand] for operand in operands if operand in self._axes]
        if out is None or not axes:
            return None
        axis = axes[0]
        constants = []
        for operand in operands:
            value = tensor_meta(operand)
            if value is None:
                continue
            dim = axis.dim - out.dim() + value.dim()  # operands align at their last dimensions
            if operand in self._axes:
                if dim != axis.dim or _sizes(operand)[dim] != _sizes(node)[dim]:
                    return None
            elif dim >= 0 and not (isinstance(value.shape[dim], int) and value.shape[dim] == 1):
                if not self._values.is_static(operand):
                    return None
                constants.append((operand, dim))
        merged = self._merged(axes)
        for operand, dim in constants if merged else ():
            self._constant(node, operand, dim, axis)
        return merged

    def _unmixed(self, node: Node, name: str) -> Axis | None:
        """Pooling, means over pixels and reshapes of one operand."""
        operands = [operand for operand in node.all_input_nodes if tensor_meta(operand) is not None]
        axis = self._axes.get(operands[0]) if len(operands) == 1 else None
        out = tensor_meta(node)
        if axis is None or out is None:
            return None
        before, after = _sizes(operands[0]), _sizes(node)
        if name in _RESHAPES:
            return _reshaped(axis, before, after)
        same = len(after) > axis.dim and before[: axis.dim + 1] == after[: axis.dim + 1]
        if name in POOLS or (name in ("pad", "constant_pad_nd") and _pads_behind(node, axis, len(before))):
            return axis if same and axis.dim == 1 and axis.inner == 1 and len(before) == len(after) else None
        if name in MEANS:
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            dims = [dims] if isinstance(dims, int) else dims
            behind = isinstance(dims, list | tuple) and all(d % len(before) > axis.dim for d in dims)
            return axis if behind and dims else None
        return None

    # ---- spaces -----------------------------------------------------------------------------------

    def _new(self, size: int) -> int:
        self._parents.append(len(self.sizes))
        self.sizes.append(size)
        return len(self.sizes) - 1

    def _length(self, axis: Axis) -> int:
        return axis.inner * sum(self.sizes[space] for space in axis.spaces)

    def _merged(self, axes: Sequence[Axis]) -> Axis | None:
        """One axis for tensors that meet element by element."""
        first = axes[0]
        sizes = [[self.sizes[space] for space in axis.spaces] for axis in axes]
        if any(
            (a.dim, a.inner) != (first.dim, first.inner) or s != sizes[0]
            for a, s in zip(axes, sizes, strict=True)
        ):
            return None
        for axis in axes[1:]:
            for a, b in zip(first.spaces, axis.spaces, strict=True):
                self._parents[self.root(b)] = self.root(a)
        return first

    def _fix(self, nodes: Iterable[Node], why: str) -> None:
        for node in nodes:
            for space in self._axes[node].spaces if node in self._axes else ():
                self.fixed.setdefault(space, why)

    def _constant(self, user: Node, operand: Node | None, dim: int, axis: Axis | None) -> None:
        if operand is not None and axis is not None:
            self.constants.append(Constant(user, operand, dim, axis))


def _reshaped(axis: Axis, before: Sequence[Size], after: Sequence[Size]) -> Axis | None:
    """The axis if dimensions in front of it stay, and whole dimensions behind it join it."""
    if len(after) <= axis.dim or before[: axis.dim] != after[: axis.dim]:
        return None
    (old, *rest), new = before[axis.dim :], after[axis.dim]
    if not isinstance(old, int) or not isinstance(new, int) or not all(isinstance(n, int) for n in rest):
        return axis if old == new and before[axis.dim :] == after[axis.dim :] else None
    if new % old or math.prod(int(n) for n in rest) % (new // old):
        return None
    return Axis(axis.spaces, axis.dim, axis.inner * (new // old))


def _pads_behind(node: Node, axis: Axis, dims: int) -> bool:
    pads = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
    return isinstance(pads, list | tuple) and len(pads) <= 2 * (dims - axis.dim - 1)


def _sizes(node: Node) -> list[Size]:
    """Sizes that compare without a guard: symbols as text."""
    value = tensor_meta(node)
    assert value is not None
    return [size_of(n) for n in value.shape]
