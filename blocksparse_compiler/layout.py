"""Which layers we know, and one weight layout for all of them: `[O, C/groups, *kernel]`."""

from __future__ import annotations

from torch import Tensor, nn

DENSE_TYPES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)


def groups_of(layer: nn.Module) -> int:
    """Number of convolution groups; 1 for a linear layer."""
    return int(getattr(layer, "groups", 1))


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """`[A, B/groups, *kernel]` → `[B, A/groups, *kernel]`, group by group. Its own inverse."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def canonical_weight(weight: Tensor, layer: nn.Module) -> Tensor:
    """A layer's weight as `[O, C/groups, *kernel]`; torch has `[C, O/groups, …]` if transposed."""
    return swap_channels(weight, groups_of(layer)) if is_transposed(layer) else weight


def layer_weight(canonical: Tensor, layer: nn.Module) -> Tensor:
    """Inverse of `canonical_weight`."""
    return swap_channels(canonical, groups_of(layer)) if is_transposed(layer) else canonical


def canonical_shape(layer: nn.Module) -> tuple[int, ...]:
    """`(O, C/groups, *kernel)` without touching the weight."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    out_channels, in_channels, kernel = layer.out_channels, layer.in_channels, layer.kernel_size
    return int(out_channels), int(in_channels) // groups_of(layer), *kernel  # type: ignore[arg-type,misc]
