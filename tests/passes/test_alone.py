"""Passes work in a program that never touches the backend."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch, blocksparse_compiler as bsc
model = bsc.prune_blocks(torch.nn.Linear(64, 64), (32, 32), 0.5)
x = torch.randn(2, 64)
gm = bsc.trace(model, x)
assert bsc.passes.lower_sites(gm, bsc.plan(gm, allow_dense=False)) == 1
torch.testing.assert_close(gm(x), model(x))
"""


def test_lowering_registers_its_operators():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=300)
