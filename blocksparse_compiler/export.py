"""`export`: one `.pt2` file that runs without this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .devices import AnyDevice
from .devices import device as find_device
from .errors import LayerError
from .passes.find_sites import find_sites
from .passes.pipeline import PassContext, run_pipeline
from .plan import Plan
from .trace import trace


def export(
    model: torch.nn.Module,
    example_inputs: Sequence[Any],
    path: str | Path,
    *,
    dynamic_shapes: Any = None,
    device: str | AnyDevice | None = None,
    options: dict[str, Any] | None = None,
) -> Plan:
    """Compiles `model` ahead of time into a package for `torch._inductor.aoti_load_package`.

    The file holds machine code for this machine's instruction set, or for the GPU that the model is on, and
    the kept tiles; loading it needs torch alone.

    Args:
        example_inputs: positional inputs, as in `torch.export.export`.
        path: where to write; ends in `.pt2`.
        dynamic_shapes: as in `torch.export.export`, for example a dynamic batch.
        device: the machine to plan for, of the type that the model is on; by default this one.
        options: as for the backend (`plan`, `dense`, `block_shape`, and Inductor's own).

    Returns:
        The plan that was carried out.

    Raises:
        LayerError: if `path` does not end in `.pt2`, the model is on a device of another type than `device`,
            or it cannot be captured as one graph.
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
        _spec(gm, device),
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
            "force_layout_optimization": any(not d.is_dense and d.site.kernel_size for d in plan),
            "post_grad_custom_post_pass": inductor_api.cache_key_pass(source_digest(), parsed.inductor),
        }
        inductor_api.aoti_compile_and_package(program, str(path), config)
    return plan


def _spec(gm: torch.fx.GraphModule, device: str | AnyDevice | None) -> AnyDevice | None:
    """The device to plan for; None plans each layer for the one that it is on."""
    if device is None:
        return None
    spec = find_device(device)
    for site in find_sites(gm):
        if not site.device.startswith(spec.type):
            fix = f"Move the model and its inputs first: .to({spec.type!r})."
            raise LayerError(
                "export", f"a model on {spec.type}, for {spec.name}", f"one on {site.device}", fix
            )
    return spec
