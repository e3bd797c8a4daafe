"""What stands between a weight and its use in training: one factor per block, as a parametrization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .pattern import BlockPattern


class BlockGate(nn.Module):
    """Multiplies every block of a weight by a factor; a block whose factor is zero is pruned.

    Base class of the ways to value blocks (`BlockScale` and those in `importance`). A subclass says what
    the factors are; one that can be pruned to a budget also has `score` and `select`.

    Args:
        full: the pattern of all blocks of the weight `[O, C/groups, *kernel]`.
        transposed: whether the layer stores its weight as `[C, O/groups, *kernel]`.
        dtype, device: of the layer's weight.
    """

    name: ClassVar[str] = ""
    per_tap: ClassVar[bool] = False  # whether the blocks of each tap may be told apart
    held: Tensor | None

    def __init__(
        self,
        full: BlockPattern,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.block_shape, self.groups, self.transposed = full.block_shape, full.groups, transposed
        self.group_channels = full.group_channels
        self.register_buffer("held", None, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, in the layer's own layout."""
        if self.held is None:
            return self.gated(weight)
        fixed = weight * self.expand(self.held, weight.dim() - 2).to(weight.dtype)
        return torch.ops.blocksparse.with_zero_grad(fixed, list(self.parameters()))  # type: ignore[no-any-return]

    def gated(self, weight: Tensor) -> Tensor:
        """The same, as long as the gate learns."""
        raise NotImplementedError

    def factors(self) -> Tensor:
        """The factor of each block, without gradient. Collective, if FSDP shards the parameters."""
        raise NotImplementedError

    @torch.no_grad()
    def hold(self, held: bool = True) -> None:
        """Fixes the factors at what they are, or frees them.

        The gate's parameters then get zeros as gradients: the reducers of torch.distributed wait for every
        gradient that they know of.
        """
        from . import training_ops as _training_ops  # noqa: F401  registers with_zero_grad

        self.held = self.factors().clone() if held else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Says what torch's own message about a wrong size means."""
        for name, parameter in self.named_parameters():
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and found.shape != parameter.shape:
                layer, (bh, bw) = prefix.partition(".parametrizations")[0], self.block_shape
                args[-1].append(
                    f"{layer}: expected {list(parameter.shape)} blocks of {bh}x{bw} channels, got "
                    f"{list(found.shape)}. Build the model with the block shape that it was saved with."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def kept(self) -> Tensor:
        """bool `[rows, cols]`, or `[rows, taps, cols]`: the blocks that are not exactly zero."""
        raise NotImplementedError

    def score(self, strength: Tensor) -> Tensor:
        """How much each block is worth keeping, at least 0, like `kept`; 1 is an average block.

        Args:
            strength: root mean square of each block of the weight before the gate, like `kept`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def select(self, kept: Tensor) -> None:
        """Prunes all blocks but these, in place; blocks that were pruned before may be among them."""
        raise NotImplementedError

    def expand(self, per_block: Tensor, spatial_dims: int) -> Tensor:
        """One value per block `[rows, cols]` → one per channel pair, broadcastable over the weight."""
        (bh, bw), (og, cg) = self.block_shape, self.group_channels
        rows, cols = per_block.shape[0] // self.groups, per_block.shape[1]
        tiles = per_block.reshape(self.groups, rows, 1, cols, 1).expand(-1, -1, bh, -1, bw)
        channels = tiles.reshape(self.groups, rows * bh, cols * bw)[:, :og, :cg]
        if self.transposed:
            channels = channels.transpose(1, 2)
        return channels.reshape(self.groups * channels.shape[1], channels.shape[2], *[1] * spatial_dims)

    def extra_repr(self) -> str:
        bh, bw = self.block_shape
        return f"block={bh}x{bw}, kept={int(self.kept.sum())}/{self.kept.numel()}"


def block_gate_of(layer: nn.Module) -> BlockGate | None:
    """The gate on a layer's weight, if it has one."""
    if parametrize.is_parametrized(layer, "weight"):
        for parametrization in layer.parametrizations["weight"]:  # type: ignore[index,union-attr]
            if isinstance(parametrization, BlockGate):
                return parametrization
    return None


def block_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, BlockGate]]:
    """(qualified name, layer, gate) of every gated layer; shared gates once."""
    seen = set()
    for name, module in model.named_modules():
        gate = block_gate_of(module)
        if gate is not None and gate not in seen:
            seen.add(gate)
            yield name or type(module).__name__, module, gate


def whole(parameter: Tensor) -> Tensor:
    """Detached; of a parameter that FSDP shards, all of it (a collective operation)."""
    detached = parameter.detach()
    return detached.full_tensor() if hasattr(detached, "full_tensor") else detached


def local_part(parameter: Tensor) -> Tensor:
    """Detached, sharing memory; of a parameter that FSDP shards, the part on this rank."""
    detached = parameter.detach()
    return detached.to_local() if hasattr(detached, "to_local") else detached
