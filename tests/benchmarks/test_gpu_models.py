"""The GPU benchmark of whole networks, run in the interpreter on a small one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import gpu_models, pictures, report, resnext, zoo


def _small() -> zoo.Network:
    model = nn.Sequential(nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 32)).eval()
    return zoo.Network(model, model, lambda batch: torch.randn(batch, 32, 4, 4))


def run(folder: Path, **options) -> dict:
    arguments = {"minutes": 5, "model": ["small"], "batch": [1, 2], "keep": ["0.5"], "block": "16x16"}
    rest = {"autotune": False, "folder": folder, "name": "models"}
    gpu_models.run(device="interpret", **{**arguments, **rest, **options})
    return report.load(folder / "models.json")


@pytest.mark.filterwarnings("ignore")
def test_a_run_without_a_gpu(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    monkeypatch.setitem(zoo.NETWORKS, "small", _small)
    data = run(tmp_path)
    assert [row["batch"] for row in data["rows"]] == [1, 2]
    for row in data["rows"]:
        assert row["kept"] == pytest.approx(0.5, abs=0.02)
        assert row["error"] < 0.02
        assert "dense" not in row["kernels"]
        assert set(row["compile_seconds"]) == {"inductor", "ours"}
    assert (tmp_path / "models.png").exists() == pictures.can_draw()
    assert "triton_" in capsys.readouterr().out


def test_a_network_that_fails_leaves_a_line_and_the_others(monkeypatch, tmp_path):
    def broken() -> zoo.Network:
        raise ValueError("no such weights")

    monkeypatch.setitem(zoo.NETWORKS, "broken", broken)
    data = run(tmp_path, model=["broken"], batch=[1])
    assert data["rows"] == []
    assert "no such weights" in data["log"][0]


def test_resnext_has_the_published_size():
    model = resnext.resnext50()
    assert sum(p.numel() for p in model.parameters()) == 25_028_904
    assert resnext.resnext50(((64, 128, 1),), 10).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)
