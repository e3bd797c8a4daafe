"""The `blocksparse` command."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from .errors import BlockSparseError, OptionError
from .pattern import check_block_shape

app = typer.Typer(
    name="blocksparse",
    help="What the block-sparse compiler does with a model, and on what machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
out, err = Console(), Console(stderr=True)

Model = Annotated[
    str,
    typer.Argument(
        help="`package.module:name` of a model, or of a function without arguments that makes one. "
        "The current folder is searched too."
    ),
]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        "-i",
        help="Shape of one example input, `1x3x224x224`; with a dtype, `1x128:int64`. May be repeated.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Plan for this device instead of the present one: a name, or a `.json` file of figures."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def explain(
    model: Model,
    input: Inputs,
    device: Device = None,
    block_shape: Annotated[str | None, typer.Option(help="Consider only this tile, `32x32`.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the table as a page.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Also save the plan as JSON, to edit and compile with.")
    ] = None,
    kernels: Annotated[
        Path | None, typer.Option(help="Also write each layer's generated source here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show for every convolution and linear layer which kernel it gets, and why.

    Example: `blocksparse explain torchvision.models:resnet50 -i 1x3x224x224 --html resnet50.html`
    """
    from .explain import explain as explain_model

    shape = check_block_shape(_sizes(block_shape, "--block-shape"), "--block-shape") if block_shape else None
    explanation = explain_model(
        load_model(model), *map(example_input, input), device=device, block_shape=shape
    )
    if as_json:
        _print_json(explanation.to_json())
    else:
        out.print(explanation)
    if html:
        err.print(f"wrote {explanation.to_html(html)}", highlight=False)
    if plan:
        explanation.plan.save(plan)
        err.print(f"wrote {plan}", highlight=False)
    if kernels:
        kernels.mkdir(parents=True, exist_ok=True)
        suffix = ".py" if explanation.device.type == "cuda" else ".cpp"
        for name, source in explanation.kernels.items():
            (kernels / (re.sub(r"[^\w.-]", "_", name) + suffix)).write_text(source)
        err.print(f"wrote {len(explanation.kernels)} kernels to {kernels}", highlight=False)


@app.command()
def recommend(
    model: Model,
    input: Inputs,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="Plan for layers of this dtype, `bfloat16`; else the model's.")
    ] = None,
    block_shape: Annotated[
        list[str] | None, typer.Option(help="Compare only these block shapes, `64x32`. May be repeated.")
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="Share of blocks kept, `0.25`. May be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show before training which block shape would pay on a device, and how much.

    Example: `blocksparse recommend torchvision.models:resnet50 -i 64x3x224x224 --device h200`
    """
    from .recommend import DENSITIES, recommend_block_shape

    found = recommend_block_shape(
        load_model(model),
        *map(example_input, input),
        device=device,
        dtype=dtype,
        block_shapes=[check_block_shape(_sizes(s, "--block-shape"), "--block-shape") for s in block_shape]
        if block_shape
        else None,
        densities=density or DENSITIES,
    )
    if as_json:
        _print_json(found.to_json())
    else:
        out.print(found)


@app.command()
def inspect(
    model: Model,
    input: Inputs,
    target: Annotated[
        str, typer.Option(help="`sm_80`, `sm_90`, `gfx942`, or a GPU by name: `h200`, `mi300x`.")
    ] = "sm_90",
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Also write sources, machine code and tables to this folder.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Convert the model first, `bfloat16` or `bf16`.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Prune first, keeping this share of the blocks: `0.25`.")
    ] = None,
    block: Annotated[str, typer.Option(help="Block shape for `--density`.")] = "64x64",
    dense: Annotated[
        str, typer.Option(help="`never` takes a block-sparse kernel wherever one exists.")
    ] = "auto",
    plan: Annotated[Path | None, typer.Option(help="Carry out this saved plan.")] = None,
) -> None:
    """Generate and cross-compile the GPU kernels of a model; needs no GPU.

    Shows the plan, and for every kernel what it fuses, its registers, spills, shared memory and matrix
    instruction. With `--out`, also writes its Triton source, PTX and cubin (AMD: assembly and hsaco).

    Example: `blocksparse inspect torchvision.models:resnet50 -i 64x3x224x224 --target sm_90 --dtype bf16
    --density 0.25 --out kernels`
    """
    from .inspect_kernels import inspect_kernels
    from .passes.prune_blocks import prune_blocks
    from .plan import Plan
    from .progress import progress_line

    network, inputs = load_model(model), list(map(example_input, input))
    if density is not None:
        prune_blocks(network, check_block_shape(_sizes(block, "--block"), "--block"), density)
    with progress_line() as line:
        found = inspect_kernels(
            network,
            *inputs,
            target=target,
            dtype=_dtype(dtype) if dtype else None,
            dense=dense,
            plan=Plan.load(plan) if plan else None,
            progress=lambda what, done, total: line.update(what, done, total or None),
        )
    out.print(found)
    if density is None and all(decision.pattern is None for decision in found.plan):
        err.print("no layer has zero blocks; --density 0.25 prunes the model first", highlight=False)
    if out_dir:
        err.print(f"wrote {len(found.reports)} kernels to {found.write(out_dir)}", highlight=False)
    if any(report.compiled is None for report in found.reports):
        raise typer.Exit(1)


@app.command()
def report(model: Model, input: Inputs, as_json: AsJson = False) -> None:
    """Show parameters, multiply-adds and kept blocks per layer, against the dense model."""
    from .report import sparsity_report

    result = sparsity_report(load_model(model), *map(example_input, input))
    if as_json:
        _print_json(result.to_dict())
    else:
        out.print(result)


@app.command()
def calibrate(
    quick: Annotated[bool, typer.Option(help="Leave out our kernels in every tile.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this machine again, and keep the figures for later plans. Let it be idle meanwhile."""
    from .calibrate import Busy, measure_host, stored_path
    from .tables import device_table

    try:
        spec = measure_host(thorough=not quick)
    except Busy as busy:
        err.print(f"[red]not measured:[/] {busy}. Try again when it is idle.", highlight=False)
        raise typer.Exit(1) from None
    if as_json:
        _print_json(spec.to_json())
    else:
        out.print(device_table(spec))
        err.print(f"kept in {stored_path()}", highlight=False)


@app.command()
def info(
    check: Annotated[
        bool, typer.Option(help="Compile and run a small model, to see whether all works.")
    ] = True,
    device: Device = None,
) -> None:
    """Show versions, the machine as the planner sees it, caches, and whether everything works."""
    from .diagnostics import facts, self_test
    from .tables import device_table, facts_table

    out.print(facts_table(facts()))
    if device is not None:
        from .devices import device as find_device

        out.print(device_table(find_device(device)))
    if check:
        with err.status("compiling a small model"):
            problem = self_test()
        if problem:
            err.print(f"[red]does not work:[/] {problem}", highlight=False)
            raise typer.Exit(1)
        out.print("[green]works:[/] a small block-sparse model compiles and gives the right answer")


# ---- reading arguments -----------------------------------------------------------------------------


def load_model(spec: str) -> torch.nn.Module:
    """The model that `package.module:name` names, in eval mode.

    Raises:
        OptionError: if there is no such module or name, or it is no model and makes none.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise OptionError(
            "model", "package.module:name", repr(spec), "For example torchvision.models:resnet50."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise OptionError(
            f"model {spec!r}",
            f"an importable module {module_name!r}",
            str(error),
            "Install it, or run from the folder that holds it.",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n, v in vars(found).items() if not n.startswith("_") and callable(v)][:12]
            raise OptionError(
                f"model {spec!r}",
                f"{part!r} in {module_name}",
                "no such name",
                f"It has: {', '.join(names) or 'nothing callable'}.",
            )
        found = getattr(found, part)
    return _make_model(spec, found).eval()


def _make_model(spec: str, found: Any) -> torch.nn.Module:
    if isinstance(found, torch.nn.Module):
        return found
    fix = "Name a model, or a function without required arguments that returns one."
    if not callable(found):
        raise OptionError(f"model {spec!r}", "a torch.nn.Module or a function", type(found).__name__, fix)
    try:
        made = found()
    except TypeError as error:
        raise OptionError(f"model {spec!r}", "a function without arguments", str(error), fix) from error
    if not isinstance(made, torch.nn.Module):
        raise OptionError(f"model {spec!r}", "a torch.nn.Module from it", type(made).__name__, fix)
    return made


def example_input(text: str) -> torch.Tensor:
    """A random tensor from `"1x3x224x224"` or `"1x128:int64"`. Raises `OptionError` on other text."""
    sizes, _, dtype_name = text.partition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise OptionError(
            "--input", "a torch dtype after the colon", repr(dtype_name), "For example 1x128:int64."
        )
    shape = _sizes(sizes, "--input")
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype)
    return torch.zeros(shape, dtype=dtype)


def _sizes(text: str, where: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise OptionError(where, "sizes joined by x", repr(text), "For example 1x3x224x224.")
    return tuple(int(size) for size in text.split("x"))


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, _DTYPES.get(name, name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError("--dtype", "a floating-point dtype of torch", repr(name), "For example bfloat16.")
    return found


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1))


def main() -> None:
    """Entry point: an error of ours is one message, not a traceback."""
    try:
        app()
    except BlockSparseError as error:
        err.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
