"""Loads the checkpoint of a folded model into a freshly built dense one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import LayerError
from .layers import SAVED, KeptTiles, become_block_sparse, dense_type_of, saved_pattern
from .layout import DENSE_TYPES, canonical_shape, groups_of
from .pattern import BlockPattern
from .weights import make_plain, weight_parameters


def load_folded(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Folds the layers of `model` that the checkpoint holds as kept tiles, and loads it; changes it in place.

    Args:
        model: built as before training; its layers may be dense, scaled or already folded.
        state_dict: the `state_dict()` of a model that went through `fold_zero_blocks`.

    Raises:
        PatternError: naming the layer, if its part is for another weight shape or contradicts itself.
        LayerError: if the keys or shapes are not those of the model. Nothing is changed then.
    """
    patterns: dict[nn.Module, BlockPattern] = {}
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        saved = {key: state_dict[prefix + key] for key in SAVED if prefix + key in state_dict}
        if not isinstance(module, DENSE_TYPES) or len(saved) < len(SAVED):
            continue
        where = name or type(module).__name__
        dense_type_of(module, where)
        patterns[module] = saved_pattern(where, canonical_shape(module), groups_of(module), saved)
        gone = (prefix + "weight", prefix + "parametrizations.weight.", prefix + "values", prefix + "kept")
        expected = {key: shape for key, shape in expected.items() if not key.startswith(gone)}
        expected |= {prefix + key: tuple(tensor.shape) for key, tensor in saved.items()}
    _check_keys(expected, {key: tuple(tensor.shape) for key, tensor in state_dict.items()})

    tied: dict[int, nn.Parameter] = {}
    for module, pattern in patterns.items():
        if isinstance(module, KeptTiles):
            continue  # takes the pattern while loading
        owner = id(weight_parameters(module)[0])
        make_plain(module)
        if owner not in tied:
            values = module.weight.new_empty(pattern.num_kept, *pattern.block_shape)  # type: ignore[operator,union-attr]
            tied[owner] = nn.Parameter(values, requires_grad=weight_parameters(module)[0].requires_grad)
        become_block_sparse(module, torch.empty(0), pattern, tied[owner])
    model.load_state_dict(state_dict)
    return model


def _check_keys(expected: dict[str, tuple[int, ...]], got: dict[str, tuple[int, ...]]) -> None:
    missing = [f"no {key}" for key in expected.keys() - got.keys()]
    unexpected = [f"an unknown {key}" for key in got.keys() - expected.keys()]
    shapes = [
        f"{key} of shape {list(got[key])} instead of {list(expected[key])}"
        for key in expected.keys() & got.keys()
        if got[key] != expected[key]
    ]
    wrong = sorted(missing + unexpected + shapes)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise LayerError(
            "load_folded",
            "the keys and shapes of this model",
            ", ".join(wrong[:5]) + more,
            "Build the model with the sizes it was saved with.",
        )
