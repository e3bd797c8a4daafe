"""Plans for GPUs, made on any machine: tables, pages, JSON, dynamic sizes."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from torch import nn

import blocksparse_compiler as bsc
from blocksparse_compiler.devices import device
from blocksparse_compiler.gpu_devices import SPECS, GpuSpec
from blocksparse_compiler.tables import device_table


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(128, 256, 3, padding=1, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.Conv2d(256, 256, 1),
        nn.Conv2d(256, 256, 3, padding=1, groups=256),
        nn.ConvTranspose2d(256, 64, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 512),
    ).eval()
    bsc.prune_blocks(model, (64, 64), 0.25, include=["0", "3"])
    return model.to(torch.bfloat16)


IMAGES = torch.randn(64, 128, 28, 28, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def explanation():
    return bsc.explain(network(), IMAGES, device="h200")


def test_layers_are_planned_for_the_gpu(explanation):
    plan = explanation.plan
    assert plan.device == "h200" and {d.site.device for d in plan} == {"cuda"}
    assert not plan["0"].is_dense and plan["0"].kernel.startswith("triton_")
    reasons = {d.site.name: d.reason for d in plan if d.is_dense}
    assert "depthwise" in reasons["4"] and "no zero blocks" in reasons["8"]


def test_it_prints(explanation, tmp_path):
    text = str(explanation)
    assert "on h200 (132 multiprocessors, sm_90)" in text and "triton_" in text
    page = explanation.to_html(tmp_path / "page.html").read_text()
    assert "132 multiprocessors" in page
    data = json.loads(json.dumps(explanation.to_json()))
    assert GpuSpec.from_json(data["device"]) == SPECS["h200"]
    assert bsc.Plan.from_json(data["plan"])["0"].config == explanation.plan["0"].config


@pytest.mark.parametrize("name", ["h200", "mi300x", "avx2-4core"])
def test_every_figure_of_a_device_prints(name):
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(device_table(device(name)))
    text, spec = capture.get(), device(name)
    assert spec.summary in text
    assert all(f"efficiency {kind}" in text for kind in spec.efficiency)
    rows = [line for line in text.splitlines() if line.startswith("│")]
    nested = sum(len(v) - 1 for v in (getattr(spec, n) for n in spec.number_names()) if isinstance(v, dict))
    assert len(rows) == len(spec.number_names()) + nested + len(spec.efficiency)
    assert all(row.split("│")[4].strip() for row in rows)  # a source each


def test_a_dynamic_batch_is_planned_for_the_size_seen():
    model = network()
    batch = torch.export.Dim("batch", min=2, max=512)
    graph = bsc.trace(model, IMAGES, dynamic_shapes=({0: batch},))
    plan = bsc.plan(graph, "h200")
    static = bsc.plan(bsc.trace(model, IMAGES), "h200")
    assert plan["0"].site.input_shape[0] != 64  # symbolic
    assert [d.is_dense for d in plan] == [d.is_dense for d in static]
    assert plan["0"].estimates["dense"] == pytest.approx(static["0"].estimates["dense"])
    few = bsc.plan(graph, "h200", hints={str(plan["0"].site.input_shape[0]): 2})
    assert few["0"].estimates["dense"] < plan["0"].estimates["dense"]


def test_an_old_gpu_gets_a_dense_plan_that_says_why():
    old = SPECS["a100"].with_figures("test", name="turing", arch=75)
    plan = bsc.plan(bsc.trace(network(), IMAGES), old)
    assert all(d.is_dense for d in plan)
    assert plan["0"].reason.endswith("need compute capability 8.0, this GPU has 7.5")
    assert all(d.is_dense for d in bsc.plan(bsc.trace(network(), IMAGES), old, allow_dense=False))


def test_fp32_follows_the_setting_of_torch(monkeypatch):
    graph = bsc.trace(network().float(), IMAGES.float())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    fast = bsc.plan(graph, "h200")["0"].estimates["dense"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = bsc.plan(graph, "h200")["0"].estimates["dense"]
    assert exact > 2 * fast
