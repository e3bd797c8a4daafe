"""`export`: one `.pt2` file that runs without this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .devices import DeviceSpec
from .devices import device as find_device
from .errors import LayerError
from .passes.pipeline import PassContext, run_pipeline
from .plan import Plan
from .trace import trace


def export(
    model: torch.nn.Module,
    example_inputs: Sequence[Any],
    path: str | Path,
    *,
    dynamic_shapes: Any = None,
    device: str | DeviceSpec | None = None,
    options: dict[str, Any] | None = None,
) -> Plan:
    """Compiles `model` ahead of time into a package for `torch._inductor.aoti_load_package`.

    The file holds machine code for this machine's instruction set and the kept tiles; loading it needs
    torch alone.

    Args:
        example_inputs: positional inputs, as in `torch.export.export`.
        path: where to write; ends in `.pt2`.
        dynamic_shapes: as in `torch.export.export`, for example a dynamic batch.
        device: the machine to plan for; by default this one.
        options: as for the backend (`plan`, `dense`, `block_shape`, and Inductor's own).

    Returns:
        The plan that was carried out.

    Raises:
        LayerError: if `path` does not end in `.pt2` or the model cannot be captured as one graph.
        OptionError: for an unknown option.
    """
    # Not at the top: Inductor is slow to import, and training needs none of it.
    from .codegen import inductor_api, lowerings
    from .codegen.lowerings import source_digest
    from .options import BackendOptions

    if Path(path).suffix != ".pt2":
        raise LayerError("export", "a path that ends in .pt2", repr(str(path)), "Rename the file.")
    parsed = BackendOptions.parse(options)
    gm = trace(model, *example_inputs, dynamic_shapes=dynamic_shapes)
    context = PassContext(
        device if isinstance(device, DeviceSpec) else find_device(device),
        block_shape=parsed.block_shape,
        allow_dense=parsed.dense == "auto",
        given_plan=parsed.plan,
    )
    lowerings.register()
    plan = run_pipeline(gm, context)
    with torch.no_grad():
        program = torch.export.export(gm, tuple(example_inputs), dynamic_shapes=dynamic_shapes, strict=False)
        config = {
            **parsed.inductor,
            "freezing": True,
            "post_grad_custom_post_pass": inductor_api.cache_key_pass(source_digest(), parsed.inductor),
        }
        inductor_api.aoti_compile_and_package(program, str(path), config)
    return plan
