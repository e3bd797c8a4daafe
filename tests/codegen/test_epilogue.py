"""What follows a layer runs inside its kernel: one kernel per layer, and the right numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, Layer, Layers, compiling, count_kernels, run
from torch import nn
from torch.nn import functional as F

CONV = Case((2, 32, 7, 14), 32, (3, 3), (32, 32), padding=(1, 1, 1, 1))
POINTWISE = Case((2, 32, 7, 14), 32, (1, 1), (32, 32), bias=False, parameters={"prefetch": "output"})
LINEAR = Case((2, 14, 32), 32, (), (32, 32))
BF16 = replace(CONV, variant="cpu_bf16")


def batch_norm(y, extra):
    """One that was not folded: an affine map per channel, or per feature of a linear layer."""
    shape = (-1, 1, 1) if y.dim() == 4 else (-1,)
    mean, scale = extra.flatten()[:32].reshape(shape), extra.flatten()[-32:].reshape(shape)
    return (y - mean) * scale + 1


def gate(y, extra):
    """Squeeze and excitation: a factor per image and channel."""
    return y * (extra[:, :, :1, :1] if y.dim() == 4 else extra[:, :1])


def to_float(y, extra):
    return y.float() + extra


def several_outputs(y, extra):
    z = batch_norm(y, extra) + extra
    return y, z, torch.relu(z)


EPILOGUES = {
    "relu": lambda y, extra: torch.relu(y),
    "relu6": lambda y, extra: F.relu6(y),
    "silu": lambda y, extra: F.silu(y),
    "gelu": lambda y, extra: F.gelu(y),
    "gelu_tanh": lambda y, extra: F.gelu(y, approximate="tanh"),
    "hardswish": lambda y, extra: F.hardswish(y),
    "sigmoid": lambda y, extra: torch.sigmoid(y),
    "batch_norm": batch_norm,
    "residual": lambda y, extra: torch.relu(batch_norm(y, extra) + extra),
    "gate": gate,
    "raw_output_used_twice": lambda y, extra: (torch.relu(y), y),
    "several_outputs": several_outputs,
    "other_dtype": lambda y, extra: (y > 0.5, y.to(torch.bfloat16)),
}


class Epilogues(nn.Module):
    """One layer per epilogue, each with an input of its own and one more tensor shaped like its output."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(case) for _ in EPILOGUES)

    def epilogues(self):
        """In low precision, a comparison may go either way."""
        exact = self.layers[0].case.dtype == torch.float32
        return [f if exact or name != "other_dtype" else to_float for name, f in EPILOGUES.items()]

    def forward(self, inputs):
        pairs = zip(self.layers, self.epilogues(), inputs, strict=True)
        return [epilogue(layer(x), extra) for layer, epilogue, (x, extra) in pairs]

    def expected(self, inputs):
        pairs = zip(self.layers, self.epilogues(), inputs, strict=True)
        return [epilogue(layer.reference(x), extra.double()) for layer, epilogue, (x, extra) in pairs]


@pytest.mark.parametrize("case", [CONV, POINTWISE, LINEAR, BF16], ids=["conv", "pointwise", "linear", "bf16"])
def test_epilogue_is_fused(case):
    torch.manual_seed(0)
    module = Epilogues(case)
    inputs = [(torch.randn_like(case.input()), torch.randn_like(case.input())) for _ in EPILOGUES]
    outs, source = run(module, inputs, dynamic=False)
    for name, out, want in zip(EPILOGUES, outs, module.expected(inputs), strict=True):
        one = not isinstance(out, tuple)
        for a, b in zip((out,) if one else out, (want,) if one else want, strict=True):
            b = b.to(a.dtype)
            tolerance = (
                {"rtol": 1e-2, "atol": 1e-2} if a.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
            )
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
    counts = count_kernels(source)
    assert counts["block_sparse"] <= len(EPILOGUES)
    assert counts["all"] == counts["block_sparse"], "an epilogue became a kernel of its own"


def test_symbolic_batch_fuses():
    layer = Layer(CONV)

    def block(x, extra):
        return torch.relu(batch_norm(layer(x), extra) + extra)

    with compiling(cpp_wrapper=True) as sources:
        fast = torch.compile(block, fullgraph=True, dynamic=True)
        for batch in (2, 5):
            x, extra = (torch.randn(batch, 32, 7, 14).to(memory_format=torch.channels_last) for _ in range(2))
            want = torch.relu(batch_norm(layer.reference(x), extra.double()) + extra)
            torch.testing.assert_close(fast(x, extra), want.float(), rtol=1e-4, atol=1e-4)
    assert len(sources) == 1
    assert count_kernels(sources[0]) == {"block_sparse": 1, "all": 1}


@pytest.mark.parametrize("variant, tolerance", [("cpu_f32", 1e-4), ("cpu_bf16", 1e-2)])
def test_chain_of_layers_keeps_channels_last(variant, tolerance):
    """Between layers nothing is copied, and a view of a concatenation is read in place."""
    conv, pointwise = replace(CONV, variant=variant), replace(POINTWISE, variant=variant)
    first, second, third = Layer(conv), Layer(pointwise), Layer(conv)

    def net(x):
        y = torch.cat([x, torch.relu(first(x)), x], 1)
        return third(torch.relu(second(y[:, 32:64])))

    x = conv.input()
    with torch.no_grad():
        y = torch.relu(first.reference(x))
        want = third.reference(torch.relu(second.reference(y)))
    out, source = run(net, x, dynamic=False)
    assert out.dtype == x.dtype and (out - want).norm() <= tolerance * want.norm()
    assert out.is_contiguous(memory_format=torch.channels_last)
    # The concatenation itself is the one kernel besides the three.
    assert count_kernels(source)["all"] <= 4


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="no vectors")
def test_one_row_of_pixels_is_stored_as_vectors():
    """Of a single row Inductor alone would compute one function value at a time."""
    variants = ("cpu_f32", "cpu_bf16")
    layers = Layers([Case((1, 32), 40, (), (8, 32), epilogue=F.gelu, variant=v) for v in variants])
    xs = [layer.case.input() for layer in layers.layers]
    outs, source = run(layers, xs, dynamic=False)
    for layer, x, out in zip(layers.layers, xs, outs, strict=True):
        want = F.gelu(layer.reference(x)).to(x.dtype)
        torch.testing.assert_close(out, want)
    assert "std::erf" not in source and ".erf()" in source
