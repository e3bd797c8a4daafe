"""Folded layers: the torch layers we know, holding only the tiles of their weight that are kept.

A folded layer *is* the torch layer it came from (`BlockSparseConv2d` is an `nn.Conv2d`), except that
`weight` is not a parameter but is scattered from the kept tiles on every use:

    Conv2d(weight [O, C/groups, kh, kw])  →  BlockSparseConv2d(values [n, bh, bw], pattern)

It is plain torch (`scatter_tiles`, then torch's own kernel): it trains, exports and traces like any
layer; the compiler finds the constant scatter and replaces it by a block-sparse kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import LayerError, PatternError
from .layout import DENSE_TYPES, canonical_weight, layer_weight
from .pattern import BlockPattern, BlockShape, gather_tiles, grid_shape, scatter_tiles

SAVED = ("values", "kept", "weight_shape")  # what a folded layer writes into a state dict
DENSE_KEYS = ("weight", "weight_orig", "parametrizations.weight.original")


class KeptTiles(nn.Module):
    """What all folded layers share: `weight` computed from kept tiles.

    Attributes:
        values: Parameter `[n, bh, bw]`, the kept tiles in the order of `pattern.tile_coordinates`.
        pattern: which tiles are kept, for the weight in the layout `[O, C/groups, *kernel]`.

    The state dict holds `values`, `kept` (the tile grid) and `weight_shape`, so a checkpoint carries its
    own pattern: loading one with other tiles, or another block shape, gives the layer that pattern;
    loading one for another weight shape is an error that names the layer.
    """

    dense_type: type[nn.Module]
    pattern: BlockPattern
    values: nn.Parameter
    tile_index: Tensor
    _channels_last: bool

    def __init__(self, *args: Any, pattern: BlockPattern, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        dense = self.dense_type(*args, **kwargs)
        self.__dict__.update(dense.__dict__)
        become_block_sparse(self, canonical_weight(dense.weight.detach(), dense), pattern)  # type: ignore[operator,arg-type]

    @property
    def block_shape(self) -> BlockShape:
        return self.pattern.block_shape

    @property
    def weight(self) -> Tensor:
        """The dense weight in the torch layer's own layout; differentiable with respect to `values`."""
        weight = layer_weight(scatter_tiles(self.values, self.pattern, self.tile_index), self)
        return _restride(weight, self._channels_last)

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        fix = "Write to `values`, or fold a dense layer that has the new weight."
        raise LayerError(type(self).__name__, "its kept tiles to be set", "a dense weight", fix)

    def _set_pattern(self, pattern: BlockPattern) -> None:
        """Takes another pattern; the index that `weight` scatters with follows."""
        self.pattern = pattern
        index = pattern.kept.flatten().nonzero().squeeze(1)
        self.register_buffer("tile_index", index.to(self.values.device), persistent=False)

    def reset_parameters(self) -> None:
        """Draws new values, as the dense layer would."""
        self._set_pattern(self.pattern)
        dense = self.values.new_empty(self.pattern.weight_shape)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        with torch.no_grad():
            self.values.copy_(gather_tiles(dense, self.pattern))
            if isinstance(self.bias, Tensor):
                bound = 1 / math.sqrt(math.prod(self.pattern.weight_shape[1:]))
                self.bias.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        bh, bw = self.block_shape
        tiles = f"block={bh}x{bw}, kept={self.pattern.num_kept}/{self.pattern.kept.numel()}"
        return f"{super().extra_repr()}, {tiles}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Writes the pattern too. It is no buffer: an average over models must not average it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "kept"] = self.pattern.kept.clone()
        destination[prefix + "weight_shape"] = torch.tensor(self.pattern.weight_shape)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        where = prefix.removesuffix(".") or type(self).__name__
        saved = {key: state_dict[prefix + key] for key in SAVED if prefix + key in state_dict}
        dense = [key for key in DENSE_KEYS if prefix + key in state_dict]
        if dense:
            fix = "Load it into the dense model, then call fold_zero_blocks."
            error = PatternError(where, "a checkpoint of a folded layer", f"a dense one ({dense[0]})", fix)
            error_msgs.append(str(error))
            return
        if len(saved) == len(SAVED):
            try:
                self._resize(saved_pattern(where, self.pattern.weight_shape, self.pattern.groups, saved))
            except PatternError as error:
                error_msgs.append(str(error))
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if strict:
            missing_keys += [prefix + key for key in SAVED[1:] if key not in saved]
        unexpected_keys[:] = [key for key in unexpected_keys if key.removeprefix(prefix) not in SAVED]
        self._set_pattern(self.pattern)

    def _resize(self, pattern: BlockPattern) -> None:
        """Makes room for the values of another pattern; the Parameter object stays the optimizer's."""
        if pattern != self.pattern:
            self.values.grad = None
            self.values.data = self.values.new_empty(pattern.num_kept, *pattern.block_shape)
        self._set_pattern(pattern)


class BlockSparseLinear(KeptTiles, nn.Linear):
    dense_type = nn.Linear


class BlockSparseConv1d(KeptTiles, nn.Conv1d):
    dense_type = nn.Conv1d


class BlockSparseConv2d(KeptTiles, nn.Conv2d):
    dense_type = nn.Conv2d


class BlockSparseConv3d(KeptTiles, nn.Conv3d):
    dense_type = nn.Conv3d


class BlockSparseConvTranspose1d(KeptTiles, nn.ConvTranspose1d):
    dense_type = nn.ConvTranspose1d


class BlockSparseConvTranspose2d(KeptTiles, nn.ConvTranspose2d):
    dense_type = nn.ConvTranspose2d


class BlockSparseConvTranspose3d(KeptTiles, nn.ConvTranspose3d):
    dense_type = nn.ConvTranspose3d


FOLDED_TYPES: dict[type[nn.Module], type[KeptTiles]] = {
    cls.dense_type: cls
    for cls in (
        BlockSparseLinear,
        BlockSparseConv1d,
        BlockSparseConv2d,
        BlockSparseConv3d,
        BlockSparseConvTranspose1d,
        BlockSparseConvTranspose2d,
        BlockSparseConvTranspose3d,
    )
}


def become_block_sparse(
    layer: nn.Module, weight: Tensor, pattern: BlockPattern, values: nn.Parameter | None = None
) -> None:
    """Turns a dense layer with a plain `weight` parameter into its folded form.

    The object stays the same, as torch's lazy and parametrized layers do: hooks, shared references and
    everything else set on it survive.

    Args:
        weight: `[O, C/groups, *kernel]`, whose tiles are kept.
        values: the Parameter to use instead, for layers that share one.
    """
    old = layer._parameters.pop("weight")
    assert old is not None
    if not isinstance(layer, KeptTiles):
        layer.__class__ = FOLDED_TYPES[dense_type_of(layer)]  # type: ignore[assignment]
    assert isinstance(layer, KeptTiles)
    layer._channels_last = _is_channels_last(old)
    if values is None:
        values = nn.Parameter(gather_tiles(weight.detach(), pattern), requires_grad=old.requires_grad)
    layer.values = values
    layer._set_pattern(pattern)


def dense_type_of(layer: nn.Module, name: str | None = None) -> type[nn.Module]:
    """The torch class that computes this layer (of this name, for the error message).

    Raises:
        LayerError: for any other class; one of the user's own may compute something else.
    """
    cls = parametrize.type_before_parametrizations(layer)
    if issubclass(cls, KeptTiles):
        return cls.dense_type
    for base in DENSE_TYPES:
        if cls is base or (issubclass(cls, base) and cls.__module__.startswith("torch.nn.")):
            return base
    known = ", ".join(t.__name__ for t in DENSE_TYPES)
    raise LayerError(
        name or cls.__name__, f"one of {known}", f"{cls.__module__}.{cls.__name__}", "Exclude this layer."
    )


def _is_channels_last(weight: Tensor) -> bool:
    """By strides, as `is_contiguous` says yes to both formats for a 1x1 kernel."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if weight.dim() not in formats:
        return False
    like = torch.empty(weight.shape, device="meta", memory_format=formats[weight.dim()])
    return weight.stride() == like.stride()


def _restride(weight: Tensor, channels_last: bool) -> Tensor:
    """The weight with the strides of its memory format, also where a dimension has size 1.

    Torch takes the memory format of a convolution's output from the strides of its weight as well.
    """
    if channels_last:
        weight = weight.movedim(1, -1)
    weight = weight.reshape(-1).view(weight.shape)
    return weight.movedim(-1, 1) if channels_last else weight


def saved_pattern(
    where: str,
    weight_shape: tuple[int, ...],
    groups: int,
    saved: Mapping[str, Tensor],
) -> BlockPattern:
    """The pattern that a checkpoint carries in `saved` (the keys `SAVED`).

    Raises:
        PatternError: naming the layer `where`, if it is for another weight shape or contradicts itself.
    """
    values, kept, shape = saved["values"], saved["kept"], tuple(saved["weight_shape"].tolist())
    if shape != weight_shape:
        expected = f"a checkpoint for a weight of shape {list(weight_shape)}"
        fix = "Build the model with the sizes it was saved with."
        raise PatternError(where, expected, f"one for {list(shape)}", fix)
    fix = "Save the whole layer again; values and kept belong together."
    if values.dim() != 3 or min(values.shape[1:]) < 1 or kept.dtype != torch.bool:
        got = f"values {list(values.shape)}, kept {kept.dtype}"
        raise PatternError(where, "values [n, bh, bw] and a bool tile grid", got, fix)
    n, bh, bw = values.shape
    grid = grid_shape(shape[0], shape[1] * groups, shape[2:], groups, (bh, bw))
    if tuple(kept.shape) != grid or int(kept.sum()) != n:
        expected = f"a tile grid of shape {list(grid)} with {n} kept tiles of {bh}x{bw}"
        raise PatternError(where, expected, f"shape {list(kept.shape)} with {int(kept.sum())}", fix)
    return BlockPattern(shape[0], shape[1] * groups, shape[2:], groups, (bh, bw), kept)
