"""What users may hand to the planner for GPUs by mistake: one clear error each, or a plan that says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import blocksparse_compiler as bsc
from blocksparse_compiler import devices, gpu_devices, tuned_table
from blocksparse_compiler.errors import OptionError, PatternError, PlanError
from blocksparse_compiler.gpu_devices import SPECS, GpuSpec
from blocksparse_compiler.passes.choose_kernels import choose_kernels


def graph(rows=4096):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).eval()
    bsc.prune_blocks(model, (64, 64), 0.1)
    return bsc.trace(model.bfloat16(), torch.randn(rows, 1024, dtype=torch.bfloat16))


@pytest.mark.parametrize("device", SPECS)
def test_an_empty_batch_stays_dense(device):
    for decision in bsc.plan(graph(rows=0), device):
        assert decision.is_dense
        assert decision.reason == "stays dense: its input is empty"


@pytest.mark.parametrize("shape", [(3,), (0, 4), "8x8", (16.5, 16), 16])
@pytest.mark.parametrize("device", ["h200", "avx512-2core"])
def test_block_shapes_are_two_positive_integers(shape, device):
    with pytest.raises(PatternError, match="two positive integers"):
        bsc.plan(graph(), device, block_shape=shape)


@pytest.mark.parametrize("name", ["dram", "dense/few_rows", "l1", "triton_gather"])
def test_specs_have_every_efficiency(name):
    data = devices.device("h200").to_json()
    del data["efficiency"][name]
    with pytest.raises(OptionError, match=f"none of {name}"):
        GpuSpec.from_json(data)


@pytest.mark.parametrize("efficiency", [{"dram": -1}, {"dram": "most"}, {"l2": float("nan")}, [0.5]])
def test_efficiencies_are_positive_numbers(efficiency):
    data = devices.device("h200").to_json()
    data["efficiency"] = {**data["efficiency"], **efficiency} if isinstance(efficiency, dict) else efficiency
    with pytest.raises(OptionError, match="efficiency"):
        GpuSpec.from_json(data)


def test_a_plan_for_another_gpu_names_the_kernel_that_does_not_run():
    """Tensor descriptors are of compute capability 9.0; no kernel runs on 7.5."""
    gm, h200 = graph(), devices.device("h200")
    plan = bsc.plan(gm, h200)
    assert [d.kernel for d in choose_kernels(gm, h200, plan=plan)] == [d.kernel for d in plan]
    turing = h200.with_figures("made up", name="turing", arch=75)
    with pytest.raises(PlanError, match="it does not run on turing"):
        choose_kernels(gm, turing, plan=plan)
    with pytest.raises(PlanError, match="runs on cuda, not on cpu"):
        choose_kernels(gm, devices.device("avx512-2core"), plan=plan)


DAMAGED = ["", "{", "[]", '{"entries": [{}]}', '{"entries": [{"config": {}, "pixels": 0, "tiles": 1}]}']


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_files_of_measurements_are_passed_by(text, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tuned_table, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu_devices, "MEASURED_FOLDER", tmp_path)
    (tmp_path / "h200.json").write_text(text)
    (tmp_path / "h200.figures.json").write_text(text)
    tuned_table.table.cache_clear()
    try:
        assert not bsc.plan(graph(), "h200")["0"].is_dense
        assert gpu_devices.with_measured(SPECS["h200"]) is SPECS["h200"]
    finally:
        tuned_table.table.cache_clear()
    assert caplog.text.count("is damaged") == 2
