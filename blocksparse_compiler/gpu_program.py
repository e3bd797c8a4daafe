"""From a model to the program that a GPU would run, made without one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import OptionError
from .gpu_devices import SPECS as GPU_SPECS
from .gpu_devices import GpuSpec
from .pattern import BlockShape
from .plan import Plan

if TYPE_CHECKING:
    from .codegen.mock_gpu import GpuTarget
    from .codegen.offline import OfflineProgram


def gpu_program(
    model: nn.Module,
    inputs: tuple[Any, ...],
    device: GpuSpec,
    *,
    target: str | GpuTarget | None = None,
    plan: Plan | None = None,
    dtype: torch.dtype | None = None,
    block_shape: BlockShape | None = None,
    allow_dense: bool = True,
) -> tuple[Plan, OfflineProgram]:
    """The plan that was carried out, and the generated program.

    Args:
        model: is copied to the CPU; not changed.
        target: generate for it, with the plan for `device`; by default the device's own.
        plan: as it was made by `explain`; by default it is made here.
        dtype: convert model and inputs to it first.

    Raises:
        OptionError: without Triton.
        LayerError: if the model cannot be captured as one graph.
    """
    from .codegen import offline
    from .codegen.mock_gpu import require_triton
    from .passes.pipeline import PassContext, run_pipeline
    from .trace import trace

    require_triton()
    model, inputs = on_cpu(model, inputs, dtype)
    graph = trace(model, *inputs)
    context = PassContext(device=device, given_plan=plan, block_shape=block_shape, allow_dense=allow_dense)
    made = run_pipeline(graph, context)
    return made, offline.generate(graph, inputs, target or device)


def on_cpu(
    model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype | None = None
) -> tuple[nn.Module, tuple[Any, ...]]:
    """`model` and `inputs` on the CPU, floats in `dtype`; copies where that changes anything."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to("cpu", dtype if dtype and value.is_floating_point() else value.dtype)

    tensors = [*model.parameters(), *model.buffers()]
    if any(t.device.type != "cpu" or (dtype and t.is_floating_point() and t.dtype != dtype) for t in tensors):
        model = copy.deepcopy(model).to("cpu", dtype)
    return model, pytree.tree_map(moved, inputs)


def gpu_of_target(target: str) -> GpuSpec:
    """The known GPU of a name (`h200`), or of a target (`sm_90`): the first one that has it.

    Raises:
        OptionError: for an unknown one; the message lists both.
    """
    if target in GPU_SPECS:
        return GPU_SPECS[target]
    found = next((spec for spec in GPU_SPECS.values() if spec.target == target), None)
    if found is None:
        targets = dict.fromkeys(spec.target for spec in GPU_SPECS.values())
        raise OptionError(
            "target",
            "a GPU target or the name of a GPU",
            repr(target),
            f"Targets: {', '.join(targets)}. GPUs: {', '.join(GPU_SPECS)}.",
        )
    return found
