"""What training cannot change about a weight: zeros that come from masks, frozen scales or folding.

    where(mask, W, 0)                 W trained, mask fixed      → zero where the mask is
    W * expand(S)                     W trained, S frozen        → zero where S is
    zeros.index_copy(0, index, V)     V trained (folded layer)   → zero where no tile is

A zero that a trained tensor happens to hold is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..pattern import BlockPattern, gather_tiles
from .calls import op_name, tensor_meta
from .static_values import NotStatic, StaticValues, is_pure
from .writes import written_nodes

# Functions that are polynomials in their tensor operands: where such a function of W is zero at a random
# point, it is zero everywhere, and so is its gradient. `detach` is none, nor is anything with a threshold.
_REARRANGE = {
    "reshape", "view", "permute", "transpose", "movedim", "flatten", "unflatten", "getitem", "contiguous",
    "slice", "clone", "squeeze", "unsqueeze", "t", "expand", "to", "float", "new_zeros", "zeros_like",
}  # fmt: skip
_ANCHOR = "with_zero_grad"
_POLYNOMIAL = {*_REARRANGE, _ANCHOR, "mul", "add", "sub", "neg", "where", "masked_fill", "index_copy"}
_DIGITS = (
    0,
    7,
    14,
    21,
)  # bits where the digits of a tile's number start: every dtype holds such numbers exactly


@dataclass(frozen=True)
class FixedWeight:
    """A weight as far as it is fixed.

    Args:
        probe: the weight, computed from random values in place of the trained ones: nonzero where it can be.
        trained: the trained tensors that it is made of.
        unused: those that it does not depend on, but gives zeros as gradients (`with_zero_grad`).
    """

    node: Node
    probe: Tensor
    trained: tuple[Node, ...]
    unused: tuple[Node, ...] = ()


class FixedWeights:
    """Evaluates the weights of a graph whose constants are attributes and whose trained tensors are inputs.

    Args:
        trained: the inputs that training changes, by placeholder.
    """

    def __init__(self, gm: GraphModule, trained: Mapping[Node, Tensor]) -> None:
        self._constants = StaticValues(gm)
        self._trained = trained
        self._written = written_nodes(gm)

    def get(self, node: Node) -> FixedWeight | None:
        """None if the weight is made of anything but constants and trained tensors, or not polynomially."""
        inputs = self._inputs(node)
        if inputs is None:
            return None
        if inputs == [node]:  # a plain parameter
            return FixedWeight(node, torch.ones(()).expand(self._trained[node].shape), (node,))
        generator = torch.Generator().manual_seed(0)
        probes = {
            n: _on(self._trained[n], torch.rand(self._trained[n].shape, generator=generator).add_(1))
            for n in inputs
        }
        try:
            unused = tuple(n for anchor in self._anchors(node) for n in anchor.all_input_nodes[1:])
            return FixedWeight(node, self._evaluate(node, probes), tuple(inputs), unused)
        except NotStatic:  # computed in other precision than it says
            return None

    def holds_tiles(self, weight: FixedWeight, pattern: BlockPattern) -> bool:
        """Whether the trained tensor of a weight is `[n, bh, bw]`, the kept tiles of this very pattern."""
        if len(weight.trained) != 1:
            return False
        values = self._trained[weight.trained[0]]
        shape = (pattern.num_kept, *pattern.block_shape)
        if tuple(values.shape) != shape or values.numel() >= 2**28:
            return False
        numbers = torch.arange(1, values.numel() + 1).reshape(shape)
        real = gather_tiles(
            torch.ones(pattern.weight_shape), pattern
        )  # what fills ragged tiles does not count
        for digit in _DIGITS:
            part = (numbers >> digit & 127).float()
            dense = self._evaluate(weight.node, {weight.trained[0]: _on(values, part)})
            if not torch.equal(gather_tiles(dense.float().cpu(), pattern), part * real):
                return False
        return True

    def factor(self, weight: FixedWeight, pattern: BlockPattern) -> Tensor | None:
        """The kept tiles `[n, bh, bw]` of c where the weight is c * W elementwise, W its trained tensor.

        None if it is made in any other way.
        """
        if len(weight.trained) != 1 or self._trained[weight.trained[0]].shape != weight.probe.shape:
            return None
        input, *_ = weight.trained
        like = self._trained[input]
        generator = torch.Generator().manual_seed(1)
        probes = [torch.rand(like.shape, generator=generator, dtype=torch.float32).add_(1) for _ in range(2)]
        probes = [torch.ones_like(probes[0]), *probes]
        one, *others = (self._evaluate(weight.node, {input: _on(like, probe)}) for probe in probes)
        for probe, value in zip(probes[1:], others, strict=True):
            if not torch.allclose(one * _on(like, probe), value, rtol=1e-6, atol=0):
                return None
        return gather_tiles(one, pattern)

    def _inputs(self, root: Node) -> list[Node] | None:
        """The trained tensors behind `root`; None if something else is behind it as well."""
        found: dict[Node, None] = {}
        pending, seen = [root], {root}
        while pending:
            node = pending.pop()
            if node in self._trained:
                found[node] = None
            elif not self._constants.is_static(node):
                if not is_pure(node) or node in self._written or op_name(node) not in _POLYNOMIAL:
                    return None
                pending += [n for n in _operands(node) if n not in seen]
                seen.update(_operands(node))
        return list(found)

    def _anchors(self, root: Node) -> list[Node]:
        """The calls of `with_zero_grad` behind `root`."""
        found, pending = [], [root]
        while pending:
            node = pending.pop()
            if node not in self._trained:
                found += [node] if op_name(node) == _ANCHOR else []
                pending += _operands(node)
        return found

    @torch.no_grad()
    def _evaluate(self, root: Node, probes: Mapping[Node, Tensor]) -> Tensor:
        values: dict[Node, Any] = dict(probes)
        stack = [root]
        while stack:
            node = stack[-1]
            if node not in values and (constant := self._constants.get(node)) is not None:
                values[node] = constant
            missing = [] if node in values else [n for n in _operands(node) if n not in values]
            stack.extend(missing)
            if not missing:
                stack.pop()
                if node not in values:
                    values[node] = _run(node, values)
        result: Tensor = values[root]
        return result


def _on(like: Tensor, value: Tensor) -> Tensor:
    return value.to(like.device, like.dtype)


def _operands(node: Node) -> list[Node]:
    """The nodes that a value depends on."""
    return [node.args[0]] if op_name(node) == _ANCHOR else node.all_input_nodes  # type: ignore[list-item]


def _run(node: Node, values: Mapping[Node, Any]) -> Any:
    if op_name(node) == _ANCHOR:
        return values[node.args[0]]  # type: ignore[index]
    args: Any = map_arg(node.args, lambda n: values[n])
    kwargs: Any = map_arg(node.kwargs, lambda n: values[n])
    target: Any = node.target
    if node.op == "call_method":
        value = getattr(args[0], target)(*args[1:], **kwargs)
    else:
        value = target(*args, **kwargs)
    traced = tensor_meta(node)
    if isinstance(value, Tensor) and traced is not None and value.dtype != traced.dtype:
        raise NotStatic
    return value
