"""`inspect_kernels`, `blocksparse inspect`, and Triton sources in `explain`: all without a GPU."""

from __future__ import annotations

import copy
import json

import pytest
import tiny_models
import torch
from rich.console import Console
from typer.testing import CliRunner

import blocksparse_compiler as bsc
from blocksparse_compiler import cli
from blocksparse_compiler.errors import BlockSparseError, OptionError
from blocksparse_compiler.gpu_program import gpu_of_target
from blocksparse_compiler.inspect_kernels import inspect_kernels
from blocksparse_compiler.plan import Plan

pytest.importorskip("triton", reason="Triton is not installed")

SPARSE = ["0", "4"]


@pytest.fixture(scope="module")
def model():
    return tiny_models.make()


@pytest.fixture(scope="module")
def x():
    return torch.randn(tiny_models.INPUT).to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def inspection(model, x, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return inspect_kernels(model, x, target="sm_90", dtype=torch.bfloat16, dense="never", out=folder), folder


def test_every_sparse_layer_has_a_kernel_and_its_figures(inspection):
    found, _ = inspection
    assert [d.site.name for d in found.plan if not d.is_dense] == SPARSE
    assert sorted(found.kernels) == SPARSE and all("tl.dot" in source for source in found.kernels.values())
    assert not found.problems
    for report in found.reports:
        resources = report.compiled.resources
        assert resources.registers and not resources.spill_bytes
        assert bool(resources.tensor_core) == report.kernel.is_template
        assert resources.blocks_per_multiprocessor(report.compiled.target) >= 1


def test_the_program_computes_what_the_model_does(inspection, model, x):
    exact = copy.deepcopy(model).double()(x.double())
    got = inspection[0].program.run(x.bfloat16()).double()
    assert (got - exact).norm() <= 0.02 * exact.norm()


def test_tables_name_every_layer_and_what_it_fuses(inspection):
    text = str(inspection[0])
    assert "wgmma" in text or "mma.sync" in text
    assert "conv relu" in text and "kernels for sm_90" in text and "\x1b" not in text


def test_folder(inspection):
    found, folder = inspection
    assert Plan.load(folder / "plan.json").digest == found.plan.digest
    assert (folder / "README.txt").read_text().strip() == str(found).strip()
    entries = json.loads((folder / "resources.json").read_text())["kernels"]
    assert len(entries) == len(found.reports) == len(list((folder / "kernels").iterdir()))
    for entry, report in zip(entries, found.reports, strict=True):
        place = folder / entry["folder"]
        assert entry["resources"]["registers"] == report.compiled.resources.registers
        assert report.kernel.source.strip() in (place / "kernel.py").read_text()
        assert ".target sm_90" in (place / "kernel.ptx").read_text()
        assert (place / "kernel.cubin").read_bytes().startswith(b"\x7fELF")
    names = [entry["folder"].partition("_")[2] for entry in entries if entry["kind"] == "template"]
    assert names == SPARSE


def test_amd(model, x, tmp_path):
    found = inspect_kernels(model, x, target="gfx942", dtype=torch.float16, dense="never", out=tmp_path)
    templates = [report for report in found.reports if report.kernel.is_template]
    assert not found.problems
    assert {report.compiled.resources.tensor_core for report in templates} == {"mfma"}
    assert len(list(tmp_path.rglob("kernel.hsaco"))) == len(list(tmp_path.rglob("kernel.amdgcn"))) >= 2


def test_a_kernel_that_fails_is_reported_and_hides_no_other(model, x, monkeypatch):
    from blocksparse_compiler.codegen.triton_kernel import TritonKernel

    compile_kernel = TritonKernel.compile

    def failing(kernel, target=None):
        if kernel.layers == ("4",):
            raise RuntimeError("out of luck")
        return compile_kernel(kernel, target)

    monkeypatch.setattr(TritonKernel, "compile", failing)
    found = inspect_kernels(model, x, dtype=torch.bfloat16, dense="never")
    assert found.problems == ["4: does not compile: out of luck"]
    assert "out of luck" in str(found) and sum(r.compiled is None for r in found.reports) == 1


def test_a_given_plan_is_carried_out(model, x):
    plan = bsc.explain(model, x, device="h200", dense="never").plan.with_kernel("0", "dense")
    found = inspect_kernels(model, x, target="h200", plan=plan)
    assert list(found.kernels) == ["4"] and "convolution" in found.program.externs


def test_explain_gives_triton_sources_by_layer(model, x):
    explanation = bsc.explain(model, x, device="h200", dense="never")
    assert list(explanation.kernels) == SPARSE
    assert explanation.kernels["0"] != explanation.kernels["4"]
    assert all(source.startswith("@triton.jit") for source in explanation.kernels.values())
    assert bsc.explain(torch.nn.Linear(8, 8), torch.randn(2, 8), device="h200").kernels == {}


def test_the_model_is_left_alone(model, x):
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    inspect_kernels(model, x, dtype=torch.bfloat16, dense="never")
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0] and torch.equal(value, before[name][1])


def test_targets():
    assert gpu_of_target("h200").name == "h200" and gpu_of_target("sm_80").name == "a100"
    with pytest.raises(OptionError, match=r"gfx942.*h200"):
        gpu_of_target("sm_20")


def test_bad_input(model, x, monkeypatch):
    with pytest.raises(OptionError, match="never"):
        inspect_kernels(model, x, dense="always")
    with pytest.raises(BlockSparseError):
        inspect_kernels(model, torch.randn(2, 3, 4, 4))
    import sys

    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(OptionError, match="pip install"):
        inspect_kernels(model, x)


# ---- the command ---------------------------------------------------------------------------------------

COMMAND = ["inspect", "tiny_models:make", "-i", "x".join(map(str, tiny_models.INPUT)), "--dtype", "bf16"]


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "out", Console(width=160))
    arguments = [*COMMAND, "--target", "sm_80", "--density", "0.5", "--block", "32x32", "--dense", "never"]
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "mma.sync" in result.stdout and "wrote" in result.stderr
    assert ".target sm_80" in next(tmp_path.rglob("kernel.ptx")).read_text()


@pytest.mark.parametrize(
    "more, hint",
    [
        (["--target", "sm_1"], "gfx942"),
        (["--dtype", "int8"], "bfloat16"),
        (["--density", "2"], "0.5"),
        (["--density", ".5", "--block", "x"], "block"),
    ],
)
def test_command_with_bad_arguments(more, hint):
    result = CliRunner().invoke(cli.app, [*COMMAND, *more])
    assert isinstance(result.exception, BlockSparseError) and hint in str(result.exception)


def test_command_on_a_dense_model_says_how_to_prune():
    result = CliRunner().invoke(cli.app, ["inspect", "tiny_models:dense", "-i", "32x64"])
    assert result.exit_code == 0 and "--density" in result.stderr
