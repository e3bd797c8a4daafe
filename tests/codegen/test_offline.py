"""Programs for a GPU that is not there: what they fuse, what they compute, what they compile to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import blocksparse_compiler as bsc
from blocksparse_compiler.codegen import offline
from blocksparse_compiler.devices import device
from blocksparse_compiler.errors import BlockSparseError, LayerError
from blocksparse_compiler.passes.pipeline import PassContext, run_pipeline

pytest.importorskip("triton", reason="Triton is not installed")

# Tiles lower than 64 take the older instruction on sm_90.
MATRIX_INSTRUCTIONS = {"sm_80": ("mma.sync",), "sm_90": ("wgmma", "mma.sync"), "gfx942": ("mfma",)}
DEVICE = {"sm_80": "a100", "sm_90": "h200", "gfx942": "mi300x"}


class Pointwise(nn.Module):
    """A pointwise kernel, a reduction, two outputs, an input that is a list."""

    def forward(self, x, ys):
        z = nn.functional.gelu(x) * ys[0] + ys[1]
        return {"z": z, "sum": z.float().sum(-1)}


class Dense(nn.Module):
    """What stays dense: extern convolution and product, fused pointwise ops around them."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x):
        y = torch.relu(self.conv(x))
        return torch.softmax(self.fc(y.mean((2, 3))), -1), y


class Network(nn.Module):
    """Two convolutions with batch norm, a residual sum, a linear layer."""

    def __init__(self, channels=64):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(2 * channels)
        self.fc = nn.Linear(2 * channels, 96)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)) + x)
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.fc(y.mean((2, 3))))


def pruned(dtype=torch.float32):
    torch.manual_seed(0)
    model = Network().eval()
    for norm in (model.bn1, model.bn2):
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, std=0.1)
    return bsc.prune_blocks(model, (32, 32), 0.4).to(dtype)


def lowered(model, x, target="sm_90", dynamic_shapes=None):
    gm = bsc.trace(model, x, dynamic_shapes=dynamic_shapes)
    plan = run_pipeline(gm, PassContext(device=device(DEVICE[target]), allow_dense=False))
    assert all(not decision.is_dense for decision in plan)
    return gm, plan


def compare(got, expected, tolerance):
    flat, exact = (torch.utils._pytree.tree_leaves(value) for value in (got, expected))
    assert len(flat) == len(exact) and type(got) is type(expected)
    for a, b in zip(flat, exact, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride()
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pointwise_and_reduction(dtype):
    inputs = (torch.randn(6, 50).to(dtype), [torch.randn(50).to(dtype), torch.randn(6, 1).to(dtype)])
    program = offline.generate(bsc.trace(Pointwise(), *inputs), inputs)
    assert len(program.kernels) == 1 and not program.externs and not program.templates
    (kernel,) = program.kernels
    assert "aten.sum.dim_IntList" in kernel.ops and kernel.kind == "persistent_reduction"
    double = torch.utils._pytree.tree_map(torch.Tensor.double, inputs)
    compare(program.run(*inputs), Pointwise()(*double), 2 * torch.finfo(dtype).eps)


def test_long_reductions_loop():
    x = torch.randn(3, 40000)
    program = offline.generate(bsc.trace(_Sum(), x))
    assert {kernel.kind for kernel in program.kernels} & {"reduction"}
    compare(program.run(x), _Sum()(x.double()), 1e-6)


class _Sum(nn.Module):
    def forward(self, x):
        return (x * x).sum(-1), x.argmax(-1), x.var(-1)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_dense_layers_stay_extern(target):
    model, x = Dense().eval(), torch.randn(2, 8, 12, 12)
    program = offline.generate(bsc.trace(model, x), (x,), target)
    assert program.externs == ("convolution", "addmm") and not program.templates
    assert program.inputs == ("x",) and program.constant_layers["conv_bias"] == "conv"
    compare(program.run(x), copy.deepcopy(model).double()(x.double()), 1e-6)
    for kernel in program.kernels:
        resources = kernel.compile().resources
        assert resources.registers > 0 and resources.spill_bytes == 0 and resources.tensor_core is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_network_in_one_kernel_per_layer(dtype, channels_last):
    model, x = pruned(dtype), torch.randn(20, 64, 6, 6).to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    gm, plan = lowered(model, x)
    program = offline.generate(gm, (x,), "sm_90")
    assert [kernel.layers for kernel in program.templates] == [(d.site.name,) for d in plan]
    assert not program.externs
    others = [kernel for kernel in program.kernels if not kernel.is_template]
    # The mean, with the ReLU before it; a contiguous input is laid out channels-last first.
    assert len(others) == (1 if channels_last else 2) and "aten.mean.dim" in others[-1].ops
    conv, relu = "blocksparse.conv.default", "aten.relu.default"
    fused = {
        "conv1": [conv, "aten.add.Tensor", relu],
        "conv2": [conv],
        "fc": ["blocksparse.linear.default", relu],
    }
    for name, ops in fused.items():
        kernel = program.kernel(name)
        assert list(kernel.ops) == ops and "tl.dot(" in kernel.source
        assert ("maximum(" in kernel.source) == (relu in ops)
    assert relu in others[-1].ops and conv not in others[-1].ops
    reference = copy.deepcopy(model).double()(x.double())
    compare(program.run(x), reference, 1e-6 if dtype is torch.float32 else 2e-2)


def test_symbolic_batch():
    model, x = pruned(), torch.randn(21, 64, 4, 4)
    gm, _ = lowered(model, x, "sm_80", dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    program = offline.generate(gm, (x,), "sm_80")
    for batch in (20, 23):
        x = torch.randn(batch, 64, 4, 4)
        compare(program.run(x), copy.deepcopy(model).double()(x.double()), 1e-6)


@pytest.mark.parametrize("target", MATRIX_INSTRUCTIONS)
def test_layers_compile_for_every_target(target):
    model, x = pruned(torch.bfloat16), torch.randn(20, 64, 6, 6, dtype=torch.bfloat16)
    program = offline.generate(lowered(model, x, target)[0], (x,), target)
    for kernel in program.templates:
        compiled = kernel.compile()
        resources = compiled.resources
        assert resources.tensor_core in MATRIX_INSTRUCTIONS[target] and resources.tensor_core_count
        assert resources.spill_bytes == 0 and 16 <= resources.registers <= (
            255 if program.target.is_nvidia else 512
        )
        assert resources.num_warps == kernel.num_warps
        assert 0 < resources.shared_bytes <= program.target.shared_memory_bytes
        assert kernel.name in compiled.assembly and compiled.binary.startswith(b"\x7fELF")
        if program.target.is_nvidia:
            assert resources.async_copies and resources.buffers and resources.buffers >= 2


def test_the_graph_and_the_weights_are_left_alone():
    model, x = pruned(), torch.randn(20, 64, 6, 6)
    gm, _ = lowered(model, x)
    code, weights = gm.code, {name: (t, t.clone()) for name, t in gm.state_dict(keep_vars=True).items()}
    offline.generate(gm, (x,), "sm_90")
    assert gm.code == code
    for name, tensor in gm.state_dict(keep_vars=True).items():
        assert tensor is weights[name][0] and torch.equal(tensor, weights[name][1])


def test_bad_input_is_one_clear_error():
    x = torch.randn(2, 8, 12, 12)
    gm = bsc.trace(Dense().eval(), x)
    with pytest.raises(BlockSparseError, match="sm_90"):
        offline.generate(gm, (x,), "sm_1")
    with pytest.raises(LayerError, match="eval"):
        offline.generate(bsc.trace(nn.BatchNorm2d(8).train(), x), (x,))
    with pytest.raises(TypeError, match="too many"):
        offline.generate(gm, (x,)).run(x, x)
