"""The `blocksparse` command, through Typer's runner."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from blocksparse_compiler import calibrate, cli
from blocksparse_compiler.devices import SPECS, DeviceSpec
from blocksparse_compiler.errors import BlockSparseError
from blocksparse_compiler.plan import Plan

SHAPE = "2x64x28x28"
EXPLAIN = ["explain", "tiny_models:make", "--input", SHAPE, "--device", "avx512-2core"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(cli, "out", Console(width=160))


@pytest.mark.parametrize("command", [[], ["explain"], ["report"], ["calibrate"], ["info"]])
def test_help(command):
    assert "Usage" in run(*command, "--help")


def test_explain_prints_the_table():
    text = run(*EXPLAIN)
    assert "2 of 4 layers block-sparse" in text and "avx512-2core" in text


def test_explain_writes_page_and_plan(tmp_path):
    page, plan = tmp_path / "page.html", tmp_path / "plan.json"
    run(*EXPLAIN, "--html", str(page), "--plan", str(plan), "--block-shape", "16x16")
    assert "<table>" in page.read_text()
    assert Plan.load(plan)["0"].pattern.block_shape == (16, 16)


def test_explain_json():
    data = json.loads(run(*EXPLAIN, "--json"))
    assert [d.site.name for d in Plan.from_json(data["plan"])] == ["0", "3", "4", "7"]
    assert DeviceSpec.from_json(data["device"]) == SPECS["avx512-2core"]


def test_report():
    assert "3" in run("report", "tiny_models:MODEL", "-i", SHAPE)
    data = json.loads(run("report", "tiny_models:MODEL", "-i", SHAPE, "--json"))
    assert len(data["layers"]) == 4


def test_info(monkeypatch):
    from blocksparse_compiler import diagnostics

    text = run("info", "--no-check", "--device", "avx2-4core")
    assert "torch" in text and "cache folder" in text and "GFLOP/s per thread" in text
    monkeypatch.setattr(diagnostics, "self_test", lambda: "the compiler is missing")
    result = CliRunner().invoke(cli.app, ["info"])
    assert result.exit_code == 1 and "the compiler is missing" in result.output


def test_self_test_passes():
    from blocksparse_compiler.diagnostics import self_test

    assert self_test() is None


def test_calibrate_prints_what_was_measured(monkeypatch):
    asked = []

    def measure(*, thorough):
        asked.append(thorough)
        return SPECS["avx2-4core"]

    monkeypatch.setattr(calibrate, "measure_host", measure)
    assert "avx2" in run("calibrate")
    assert DeviceSpec.from_json(json.loads(run("calibrate", "--quick", "--json"))) == SPECS["avx2-4core"]
    assert asked == [True, False]


def test_calibrate_on_a_busy_machine(monkeypatch):
    def measure(**_):
        raise calibrate.Busy("the machine is busy")

    monkeypatch.setattr(calibrate, "measure_host", measure)
    result = CliRunner().invoke(cli.app, ["calibrate"])
    assert result.exit_code == 1 and "busy" in result.output


BAD = [
    (["explain", "tiny_models", "-i", SHAPE], "package.module:name"),
    (["explain", "no_such_module:make", "-i", SHAPE], "no_such_module"),
    (["explain", "tiny_models:mak", "-i", SHAPE], "make"),
    (["explain", "tiny_models:NUMBER", "-i", SHAPE], "int"),
    (["explain", "tiny_models:needs_argument", "-i", SHAPE], "without arguments"),
    (["explain", "tiny_models:makes_nothing", "-i", SHAPE], "NoneType"),
    (["explain", "tiny_models:make", "-i", "2,64"], "1x3x224x224"),
    (["explain", "tiny_models:make", "-i", "2x64:floot"], "int64"),
    (["explain", "tiny_models:make", "-i", SHAPE, "--device", "abacus"], "avx512-16core"),
    (["explain", "tiny_models:make", "-i", "2x3x4x4", "--device", "avx2-4core"], "trace"),
]


@pytest.mark.parametrize("arguments, hint", BAD, ids=[" ".join(a[1:]) for a, _ in BAD])
def test_bad_arguments_are_one_message_without_traceback(monkeypatch, capsys, arguments, hint):
    monkeypatch.setattr("sys.argv", ["blocksparse", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    text = capsys.readouterr().err
    assert exit.value.code == 2
    assert hint in text and "error:" in text and "Traceback" not in text


def test_errors_reach_python_callers():
    with pytest.raises(BlockSparseError):
        cli.load_model("tiny_models:NUMBER")


@pytest.mark.parametrize(
    "text, shape, dtype",
    [("1x3", (1, 3), "float32"), ("4:int64", (4,), "int64"), ("2x2:bool", (2, 2), "bool")],
)
def test_example_inputs(text, shape, dtype):
    made = cli.example_input(text)
    assert tuple(made.shape) == shape and str(made.dtype) == f"torch.{dtype}"
