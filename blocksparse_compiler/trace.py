"""From a model to an FX graph that every pass accepts."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from .errors import LayerError


def trace(model: torch.nn.Module, *args: Any, dynamic_shapes: Any = None, **kwargs: Any) -> GraphModule:
    """The pre-dispatch ATen graph of `model(*args, **kwargs)`, by `torch.export`.

    Parameters and buffers are `get_attr` nodes under their qualified names; node metadata holds fake
    tensors and the layer each node came from. The graph runs like the model and shares its parameters.

    Args:
        dynamic_shapes: as in `torch.export.export`; makes sizes symbolic.

    Raises:
        LayerError: if the model cannot be captured as one graph; the cause is attached.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise LayerError(
            f"trace({type(model).__name__})",
            "a model that torch.export captures as one graph",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "Pass inputs that the model accepts and take data-dependent control flow out of forward; "
            "torch.compile(model, backend='blocksparse') works with graph breaks too.",
        ) from error
    return program.module(check_guards=False)
