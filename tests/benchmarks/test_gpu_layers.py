"""The GPU benchmark of layers, without a GPU: its cases, its workers, and a whole run in the interpreter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_cases, gpu_experiments, gpu_layers, gpu_pictures, gpu_run, pictures, report
from benchmarks.gpu_cases import Candidate, Cell
from benchmarks.gpu_worker import Pool, Worker

CONV, LINEAR = gpu_cases.TINY


def cell(shape=CONV, density=0.5) -> Cell:
    return Cell(shape, 2, "16x16", density)


# ---- cases -----------------------------------------------------------------------------------------


def test_the_main_questions_come_first_and_nothing_twice():
    blocks, densities = list(gpu_cases.BLOCKS), list(gpu_cases.DENSITIES)
    chunks = list(gpu_cases.by_importance(blocks, densities, list(gpu_cases.BATCHES)))
    first = chunks[0]
    assert {c.shape.kernel for c in first} == {3}
    assert {c.batch for c in first} == {256}
    assert {c.block for c in first} == {"64x64"}
    assert {c.density for c in first} == {0.5, 0.25}
    cells = [c for chunk in chunks for c in chunk]
    assert len(set(cells)) == len(cells)
    assert {c.block for c in cells} == set(blocks)
    assert {c.density for c in cells} == set(densities)
    assert {c.pixels for c in cells if c.shape in gpu_cases.LLAMA} >= {1, 4, 16, 2048}


def test_cells_and_candidates_travel_as_json():
    for shape in (CONV, LINEAR):
        candidate = Candidate(cell(shape), "triton_gather", (16, 16), {"pixels": 16, "precision": "tf32"})
        assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate


@pytest.mark.parametrize("shape", gpu_cases.TINY)
def test_a_cell_is_the_layer_it_names(shape):
    case = cell(shape)
    weight, again = case.weight(), Cell(shape, 2, "16x16", 0.5).weight()
    assert torch.equal(weight, again)
    assert weight.ne(0).float().mean() == pytest.approx(0.5, abs=0.02)
    x = case.input("cpu")
    out = gpu_cases.dense_layer(case)(x, weight, gpu_cases.bias(case, "cpu"))
    assert out.shape[1] == case.site().out_channels
    assert out.numel() == case.pixels * case.site().out_channels
    assert case.dense_flops == 2 * case.pixels * weight.numel()
    assert tuple(case.site().input_shape) == tuple(x.shape)


def test_a_wrong_kernel_fails_its_check(monkeypatch):
    candidate = Candidate(cell(LINEAR), "triton_gather", (16, 16), {})
    runner = gpu_run.InterpretRunner()
    monkeypatch.setattr(runner, "compile", lambda function, args: lambda *a: function(*a) * 1.05)
    with pytest.raises(RuntimeError, match="relative error"):
        gpu_run.check(runner, candidate)
    monkeypatch.setattr(runner, "compile", lambda function, args: function)
    assert gpu_run.check(runner, candidate)["error"] < 0.01


# ---- workers ---------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, time
for line in sys.stdin:
    job = json.loads(line)
    if job["variant"] == "hangs":
        time.sleep(60)
    if job["variant"] == "crashes":
        sys.exit(1)
    print(json.dumps({"error": 0.0, "restart": job["variant"] == "poisoned"}), flush=True)
"""


def worker() -> Worker:
    return Worker([sys.executable, "-c", SCRIPT])


def jobs(*variants: str) -> list[Candidate]:
    return [Candidate(cell(), name, (16, 16), {"number": i}) for i, name in enumerate(variants)]


def test_a_hang_and_a_crash_cost_one_candidate_each(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_worker.START_SECONDS", 0)
    asked = worker()
    answers = [
        asked.ask(job.to_json(), timeout=5 if job.variant != "hangs" else 0.5)
        for job in jobs("good", "hangs", "good", "crashes", "good", "poisoned", "good")
    ]
    asked.close()
    assert [a.get("failed", "") for a in answers] == [
        "",
        "no answer within 0 s: it hangs",
        "",
        "the process ended",
        "",
        "",
        "",
    ]


def test_a_pool_answers_every_candidate_and_stops_at_its_deadline():
    pool = Pool(2, worker)
    wanted = jobs(*["good"] * 7)
    answers = dict(pool.check(wanted))
    assert set(answers) == set(wanted)
    assert not list(pool.check(wanted, deadline=0))
    pool.close()


# ---- a whole run -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_run_without_a_gpu_writes_rows_a_tuned_table_and_a_picture(tmp_path: Path, capsys):
    pytest.importorskip("triton")
    gpu_layers.run(
        device="interpret", minutes=5, configs=1, tuned=True, folder=tmp_path, name="layers",
        batch=[2], block=["16x16"], density=[0.5], shape="", seconds=0, workers=1, max_autotune=0,
    )  # fmt: skip
    data = report.load(tmp_path / "layers.json")
    assert {row["shape"] for row in data["rows"]} == {str(shape) for shape in gpu_cases.TINY}
    for row in data["rows"]:
        assert not row["failed"]
        assert {c["variant"] for c in row["candidates"]} >= {"triton_gather"}
        assert set(row["speedup"]) == {"auto", "best"}
        assert row["dense"]["eager"]["median_ms"] > 0
        for candidate in row["candidates"]:
            assert 0 <= candidate["error"] < 0.01
            assert candidate["estimate_ms"] > 0
    (linear,) = (row for row in data["rows"] if row["shape"] == str(LINEAR))
    assert "triton_decode" in {c["variant"] for c in linear["candidates"]}
    entries = json.loads((tmp_path / "h200.json").read_text())["entries"]
    assert len(entries) == sum(len(row["candidates"]) for row in data["rows"])
    assert (tmp_path / "layers.png").exists() == pictures.can_draw()
    assert " 16x16 pixels" in capsys.readouterr().out


def row(dense_ms: float, auto: float) -> dict:
    return {
        "shape": "3x3", "block": "64x64", "density": 0.5, "best_dense": "eager", "dense_tflops": 100.0,
        "dense": {"eager": {"median_ms": dense_ms}}, "speedup": {"auto": auto, "best": None},
    }  # fmt: skip


def test_a_faster_dense_baseline_lowers_the_speed_ups():
    measured = row(2.0, 1.5)
    measured["dense"]["max_autotune"] = {"median_ms": 1.0}
    gpu_layers._rate_again(measured)
    assert measured["best_dense"] == "max_autotune"
    assert measured["speedup"] == {"auto": 0.75, "best": None}
    assert measured["dense_tflops"] == 200


def test_means_leave_out_what_no_kernel_ran():
    assert gpu_pictures.means([row(2.0, 1.5)]) == []


def test_a_device_option_chooses_the_gpu_benchmark():
    assert report.asks_for_gpu(["layers", "--device", "cuda", "--minutes", "1"])
    assert report.asks_for_gpu(["layers", "--device=interpret"])
    assert not report.asks_for_gpu(["layers", "--batch", "8"])


READS = {"source": "*bf16", "out": "*fp32", "tiles": "i32"}
PROBES = {
    "read_tiles": (READS, {"ROUNDS": 4, "TILE": 8192}, "ld.global.cg.v4"),
    "copy_boxes": (READS, {"ROUNDS": 4, "ROWS": 64}, "cp.async.bulk.tensor"),
    "multiply_tiles": (
        {"a": "*bf16", "b": "*bf16", "out": "*fp32"},
        {"ROUNDS": 4, "M": 64, "N": 256, "K": 64},
        "wgmma.mma_async",
    ),
}


@pytest.mark.parametrize("name", PROBES)
def test_probes_compile_for_a_gpu_to_the_instructions_they_are_about(name):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks import gpu_probes

    arguments, constants, instruction = PROBES[name]
    signature = arguments | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(arguments.values()) if "*" in kind}
    source = ASTSource(getattr(gpu_probes, name), signature, constants, aligned)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert instruction in code


# ---- experiments -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_experiments_without_a_gpu(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_experiments, "DECODE_STAGES", (3,))
    monkeypatch.setattr(gpu_experiments, "DECODE_SPLITS", (1, 2))
    gpu_experiments.run(
        device="interpret", minutes=5, workers=0, seconds=0, folder=tmp_path, name="experiments"
    )
    (found,) = report.load(tmp_path / "experiments.json")["rows"]
    assert not found["failed"]
    assert found["mask"] == "balanced"
    splits = {c["config"]["split"] for c in found["candidates"] if c["variant"] == "triton_decode"}
    assert splits >= {1, 2}


def test_masks_are_compared_on_the_same_layers():
    cells = gpu_experiments.mask_cells((14,), (64,))
    assert len(cells) == 4
    for cell in cells:
        blocks = cell.weight().abs().sum((2, 3)).reshape(4, 64, 4, 64).sum((1, 3)).ne(0)
        assert blocks.sum() == 16 * cell.density
        if cell.mask == "balanced":
            assert blocks.sum(1).unique().numel() == 1
