"""Inductor lowerings of the `blocksparse` operators, for every device.

What the kernels do not cover (a device, a dtype, a geometry) falls back to the operator itself.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import layer_chain as _layer_chain  # noqa: F401  registers an operator
from .. import pointwise_depthwise as _pointwise_depthwise  # noqa: F401
from .. import quantized_ops as _quantized_ops  # noqa: F401
from .. import training_ops as _training_ops  # noqa: F401
from ..ops import OPERATORS
from . import cpu_depthwise, cpu_gradients, cpu_layer_chain, cpu_lowerings, cpu_pointwise_depthwise
from .inductor_api import fallback_handler, has_triton_package, register_lowering
from .lowering_errors import Unsupported

log = logging.getLogger(__name__)

_CPU_FAMILIES = {
    "lower_weight_grad": cpu_gradients,
    "lower_depthwise": cpu_depthwise,
    "lower_pointwise_depthwise": cpu_pointwise_depthwise,
    "lower_layer_chain": cpu_layer_chain,
}
_HERE = Path(__file__).parent


@functools.cache
def register() -> None:
    """Registers the lowerings with Inductor, once."""
    for name in OPERATORS:
        op = getattr(torch.ops.blocksparse, name).default
        register_lowering(op, type_promotion_kind=None)(_lowering(op, name))


@functools.cache
def source_digest() -> str:
    """16 hex digits over every source that generated code comes from."""
    digest = hashlib.sha256()
    for path in sorted(p for p in _HERE.rglob("*") if p.suffix in (".py", ".h", ".jinja")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _lowering(op: Any, name: str) -> Callable[..., Any]:
    """Calls `lower_<name>` of the device's module, with the operator's arguments as one object."""
    fallback = fallback_handler(op, add_to_fallback_set=False)
    arguments, function = OPERATORS[name], f"lower_{name}"

    def lowering(x: Any, *args: Any) -> Any:
        try:
            return getattr(_family(x.get_device().type, function), function)(arguments(x, *args))
        except Unsupported as reason:
            log.warning("%s runs without a generated kernel: %s", op, reason)
            return fallback(x, *args)

    return lowering


def _family(device_type: str, name: str) -> Any:
    """The module with the lowerings for a device."""
    if device_type == "cpu":
        return _CPU_FAMILIES.get(name, cpu_lowerings)
    if device_type != "cuda" or name.endswith(("depthwise", "chain")) or name.startswith("lower_quantized"):
        raise Unsupported(f"no kernels for {device_type}")
    if not has_triton_package():
        raise Unsupported("Triton is not installed (pip install triton)")
    from . import gpu_gradients, gpu_lowerings

    return gpu_gradients if name == "lower_weight_grad" else gpu_lowerings
