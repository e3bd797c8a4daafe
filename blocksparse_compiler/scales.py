"""DBSR: one trainable scale per weight block (dynamic block-sparse reparameterization, ICCV-W 2019).

The effective weight is `clamp(S, 0, 1) * W`, with S expanded over each block and all its taps. The
gradient passes straight through the clamp: a block at `S <= 0` is exactly zero and its W learns nothing,
but its S still does, so it can come back. Two things make the method work: weight decay on W but not on
S (`param_groups`), or S shrinks while W grows; and soft-thresholding S after each step (`proximal_step`),
or S chatters around zero without ever being zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LayerError, check_number
from .gates import BlockGate, block_gate_of, block_gates, local_part, whole
from .pattern import BlockPattern


class BlockScale(BlockGate):
    """The scales S of one weight, as a parametrization for `torch.nn.utils.parametrize`.

    Attributes:
        scale: Parameter `[groups * ceil(O/groups/bh), ceil(C/groups/bw)]`, initialised to 1.
    """

    name = "scales"

    def __init__(
        self,
        full: BlockPattern,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(full, transposed)
        rows, _, cols = full.grid_shape
        self.scale = nn.Parameter(torch.ones(rows, cols, dtype=dtype, device=device))

    def gated(self, weight: Tensor) -> Tensor:
        # `scale - scale.detach()` is exactly 0 and carries the whole gradient: straight through the clamp.
        clamped = self.clamp(self.scale.detach()) + (self.scale - self.scale.detach())
        return weight * self.expand(clamped, weight.dim() - 2).to(weight.dtype)

    def clamp(self, scale: Tensor) -> Tensor:
        """The factor of each block."""
        return scale.clamp(0, 1)

    def factors(self) -> Tensor:
        return self.clamp(whole(self.scale))

    @property
    def kept(self) -> Tensor:
        """bool `[rows, cols]`: the blocks that are not exactly zero."""
        return whole(self.scale) > 0


def block_scale_of(layer: nn.Module) -> BlockScale | None:
    """The scales on a layer's weight, if it has any."""
    gate = block_gate_of(layer)
    return gate if isinstance(gate, BlockScale) else None


def block_scales(model: nn.Module) -> Iterator[tuple[str, BlockScale]]:
    """(qualified name, scales) of every scaled layer; shared ones once."""
    for name, _, gate in block_gates(model):
        if isinstance(gate, BlockScale):
            yield name, gate


def scale_penalty(model: nn.Module) -> Tensor:
    """Σ|S| over all block scales: a differentiable 0-dim tensor for `loss + gamma * scale_penalty(model)`.

    Raises:
        LayerError: if the model has no block scales.
    """
    scales = _scales("scale_penalty", model)
    device = scales[0].scale.device
    return torch.stack(
        [s.scale.abs().sum().to(device, torch.promote_types(s.scale.dtype, torch.float32)) for s in scales]
    ).sum()


@torch.no_grad()
def proximal_step(model: nn.Module, threshold: float) -> nn.Module:
    """Soft-thresholds every S in place, `S ← sign(S) · max(|S| − threshold, 0)`, so that zeros are exact.

    Call it after each `optimizer.step()`. With `threshold = learning_rate * gamma` it is the proximal
    gradient step for the penalty `gamma * Σ|S|`, and takes the place of `scale_penalty` in the loss.
    Frozen scales (`freeze_scales`) stay as they are.

    Raises:
        LayerError: if the model has no block scales.
        OptionError: if the threshold is negative or not finite.
    """
    check_number("proximal_step", "threshold", threshold, fix="Use learning_rate * gamma.")
    for block_scale in _scales("proximal_step", model):
        soft_threshold(block_scale, threshold)
    return model


@torch.no_grad()
def soft_threshold(block_scale: BlockScale, threshold: float) -> None:
    """`S ← sign(S) · max(|S| − threshold, 0)` in place, unless S is frozen."""
    if block_scale.scale.requires_grad:
        scale = local_part(block_scale.scale)
        scale.copy_(nn.functional.softshrink(scale, threshold))


def freeze_scales(model: nn.Module) -> nn.Module:
    """Ends the search for a structure: S takes no more gradient, W is fine-tuned inside the kept blocks."""
    for block_scale in _scales("freeze_scales", model):
        block_scale.scale.requires_grad_(False)
    return model


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer parameter groups: `weight_decay` on everything but the block scales.

    Raises:
        OptionError: if `weight_decay` is negative or not finite.
    """
    check_number("param_groups", "weight_decay", weight_decay, fix="Use for example 1e-4.")
    scales = {id(s.scale): s.scale for _, s in block_scales(model)}
    others = [p for p in model.parameters() if id(p) not in scales]
    return [
        {"params": others, "weight_decay": weight_decay},
        {"params": list(scales.values()), "weight_decay": 0.0},
    ]


def _scales(function: str, model: nn.Module) -> list[BlockScale]:
    scales = [scale for _, scale in block_scales(model)]
    if not scales:
        fix = "Call insert_block_scales(model) first."
        raise LayerError(function, "a model with block scales", "none", fix)
    return scales
