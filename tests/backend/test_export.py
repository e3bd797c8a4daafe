"""A package written by `export` runs without this package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import blocksparse_compiler as bsc

RUN = """
import sys, torch
sys.modules["blocksparse_compiler"] = None  # an import would fail
run = torch._inductor.aoti_load_package(sys.argv[1])
for x, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)
"""


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.Flatten(2))
    return bsc.prune_blocks(model.eval(), (32, 32), 0.5)


@torch.no_grad()
def test_a_package_runs_alone_at_every_batch_size(tmp_path):
    model, x = network(), torch.randn(2, 64, 14, 14)
    path, cases = tmp_path / "net.pt2", tmp_path / "cases.pt"
    batch = torch.export.Dim("batch", min=1, max=64)
    plan = bsc.export(model, (x,), path, dynamic_shapes=({0: batch},), options={"dense": "never"})
    assert [d.kernel for d in plan] == ["cpu_f32", "cpu_f32"]
    torch.save([(y, model(y)) for y in (x, torch.randn(1, 64, 14, 14), torch.randn(5, 64, 14, 14))], cases)
    subprocess.run([sys.executable, "-c", RUN, str(path), str(cases)], check=True, timeout=300)


def test_bad_requests():
    with pytest.raises(bsc.errors.LayerError, match=r"ends in \.pt2"):
        bsc.export(network(), (torch.randn(1, 64, 4, 4),), "net.so")
    with pytest.raises(bsc.errors.LayerError, match="one graph"):
        bsc.export(network(), (torch.randn(1, 3, 4, 4),), "net.pt2")
    with pytest.raises(bsc.errors.OptionError, match="autotun"):
        bsc.export(network(), (torch.randn(1, 64, 4, 4),), "net.pt2", options={"autotun": True})


def test_a_model_is_not_exported_for_a_device_that_it_is_not_on(tmp_path):
    with pytest.raises(bsc.errors.LayerError, match=r"a model on cuda, for h200.*one on cpu.*\.to\('cuda'\)"):
        bsc.export(nn.Linear(64, 64), (torch.randn(2, 64),), tmp_path / "m.pt2", device="h200")
