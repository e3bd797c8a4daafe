"""A whole network, every layer block-sparse, through the interpreter: kernels of all kinds side by side."""

from __future__ import annotations

import copy

import pytest
import torch

import blocksparse_compiler as bsc
from blocksparse_compiler.devices import device
from blocksparse_compiler.gpu_program import gpu_program

pytest.importorskip("triton", reason="Triton is not installed")
transformers = pytest.importorskip("transformers", reason="the network comes from transformers")


@pytest.mark.slow
def test_resnet50_on_an_h200():
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=100)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    bsc.prune_blocks(model, (64, 64), 0.3)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)

    plan, program = gpu_program(model, (x,), device("h200"), allow_dense=False)
    sparse = [decision.site.name for decision in plan if not decision.is_dense]
    assert len(sparse) >= 48 and len({decision.kernel for decision in plan}) >= 3
    computed = [layer for kernel in program.templates for layer in kernel.layers]
    assert sorted(computed) == sorted(sparse)
    # Beside one kernel a layer: the input's layout, max-pooling, the global mean, what dense layers leave.
    assert len(program.kernels) - len(program.templates) <= 3 + len(plan) - len(sparse)

    exact = copy.deepcopy(model).double()(x.double()).logits
    error, dense = program.run(x).logits - exact, model(x).logits - exact
    assert error.norm() <= 1.5 * dense.norm()
