"""Cases that once went wrong: each compiled model must equal eager."""

from __future__ import annotations

import copy
import gc
import logging
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blocksparse_compiler import BlockPattern
from blocksparse_compiler.backend import MAX_RECOMPILES, compiled_graphs
from blocksparse_compiler.codegen import cpu_template, lowerings


class Model(nn.Module):
    """`forward(self, *args)` over a half-empty 64 x 64 weight and whatever other parameters are given."""

    def __init__(self, forward, **parameters):
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(64, 64)
        weight[:32, :32] = weight[32:, 32:] = 0
        self.weight = nn.Parameter(weight)
        for name, value in parameters.items():
            setattr(self, name, value)
        self._forward = forward

    def forward(self, *args):
        return self._forward(self, *args)


def halve(model, block=32):
    """Zeroes a checkerboard of blocks in every layer, and wakes up batch norms."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            full = BlockPattern.full(layer.weight.shape, (block, block))
            rows, taps, cols = full.grid_shape
            keep = (torch.arange(rows)[:, None] + torch.arange(cols)) % 2 == 0
            layer.weight.data = full.with_kept(keep[:, None].expand(rows, taps, cols)).apply(
                layer.weight.data
            )
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model.eval()


def check(model, *inputs, sparse=None):
    """Compiled equals eager; `sparse`: how many layers run on a block-sparse kernel."""
    torch._dynamo.reset()
    fast = torch.compile(model, backend="blocksparse", fullgraph=True, options={"dense": "never"})
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    if sparse is not None:
        assert sum(not d.is_dense for d in compiled_graphs()[-1].plan) == sparse
    return fast


def test_weights_written_in_the_graph():
    def through_a_flag(self, x):
        weight = self.weight * 1
        F.relu(weight, inplace=True)
        return F.linear(x, weight)

    def as_out(self, x):
        weight = torch.empty(64, 64)
        torch.mul(self.weight, 2, out=weight)
        return F.linear(x, weight)

    x = torch.randn(6, 64)
    check(Model(through_a_flag), x, sparse=0)
    check(Model(as_out), x, sparse=0)


def test_random_weights_are_drawn_on_every_call():
    def noisy(self, x):
        return F.linear(x, self.weight + torch.normal(0.0, 1.0, (64, 64)))

    torch._dynamo.reset()
    fast, x = torch.compile(Model(noisy), backend="blocksparse", fullgraph=True), torch.randn(6, 64)
    with torch.no_grad():
        assert not torch.allclose(fast(x), fast(x))


@pytest.mark.parametrize(
    "bias",
    [torch.randn(1), torch.tensor(3.0), torch.randn(6, 64), torch.randn(128)[::2], torch.randn(1).expand(64)],
    ids=["one element", "scalar", "matrix", "strided", "expanded"],
)
def test_biases_of_any_shape_and_layout(bias):
    model = Model(lambda self, x: F.linear(x, self.weight, self.bias), bias=nn.Parameter(bias))
    check(model, torch.randn(6, 64), sparse=1)


@pytest.mark.parametrize(
    "view",
    [lambda b: b[:, 1], lambda b: b[0, :1].expand(64), lambda b: b.flatten()[3:67], lambda b: b.sin()[:, 1]],
)
def test_biases_computed_from_an_input(view):
    model = Model(lambda self, x, b: F.linear(x, self.weight, view(b)))
    check(model, torch.randn(6, 64), torch.randn(64, 2), sparse=1)


def test_batch_norm_behind_an_unbatched_convolution_has_other_channels():
    class Unbatched(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(32, 32, 3, padding=1), nn.BatchNorm1d(32)

        def forward(self, x):
            return self.norm(self.conv(x))

    check(halve(Unbatched(), 8), torch.randn(32, 32))


def test_layers_directly_behind_each_other():
    check(halve(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))), torch.randn(6, 64), sparse=2)


@torch.no_grad()
def test_symbolic_sequence_lengths_keep_their_kernel(caplog):
    model = halve(nn.Sequential(nn.Linear(64, 64), nn.GELU()))
    torch._dynamo.reset()
    fast = torch.compile(model, backend="blocksparse", dynamic=True, options={"dense": "never"})
    with caplog.at_level(logging.WARNING, "blocksparse_compiler"):
        for shape in ((2, 7, 64), (3, 9, 64)):
            x = torch.randn(shape)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert "without a generated kernel" not in caplog.text


@torch.no_grad()
def test_an_empty_input_stays_dense_with_a_reason(caplog):
    with caplog.at_level(logging.WARNING, "blocksparse_compiler"):
        check(halve(nn.Sequential(nn.Linear(64, 64))), torch.randn(0, 64))
    (decision,) = compiled_graphs()[-1].plan
    assert "empty" in decision.reason and "failed" not in caplog.text


@torch.no_grad()
def test_returned_parameters_are_the_models_own():
    model = Model(lambda self, x: (F.linear(x, self.weight), self.weight, self.weight[:2]))
    fast = check(model, torch.randn(6, 64))
    _, weight, view = fast(torch.randn(6, 64))
    assert weight is model.weight and view.requires_grad and view.data_ptr() == weight.data_ptr()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return x + self.linear(x)


@torch.no_grad()
def test_blocks_that_share_their_code_have_weights_of_their_own(caplog):
    blocks = halve(nn.Sequential(*[Block() for _ in range(MAX_RECOMPILES + 3)]))
    expected, x = copy.deepcopy(blocks), torch.randn(6, 64)
    torch._dynamo.reset()
    for block in blocks:
        block.compile(backend="blocksparse", options={"dense": "never"})
    with caplog.at_level(logging.INFO, "blocksparse_compiler"):
        for _ in range(2):
            torch.testing.assert_close(blocks(x), expected(x), rtol=1e-4, atol=1e-4)
        compilations = caplog.text.count("compiling again")
        assert compilations == len(blocks) - 1
        blocks[3].linear.weight.mul_(2)
        expected[3].linear.weight.mul_(2)
        torch.testing.assert_close(blocks(x), expected(x), rtol=1e-4, atol=1e-4)
    assert caplog.text.count("compiling again") == compilations + 1
    assert not any(d.is_dense for d in compiled_graphs()[-1].plan)


@torch.no_grad()
def test_replaced_weights_are_let_go():
    model, x = halve(Block()), torch.randn(6, 64)
    fast = check(model, x)
    old = weakref.ref(model.linear.weight)
    model.linear.weight = nn.Parameter(model.linear.weight * 2)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    gc.collect()
    assert old() is None


@torch.no_grad()
def test_a_kernel_that_cannot_be_generated_leaves_the_graph_dense(monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("torch has moved on")

    model, x = halve(Block()), torch.randn(5, 64)
    monkeypatch.setattr(cpu_template.BlockSparseTemplate, "render", broken)
    with torch._inductor.config.patch(fx_graph_cache=False):
        check(model, x)
    assert "torch has moved on" in caplog.text and "stays dense" in caplog.text
    monkeypatch.setattr(lowerings, "register", broken)
    check(model, x)


@torch.no_grad()
def test_a_plan_that_does_not_fit_names_the_layer():
    conv = halve(nn.Sequential(nn.Conv2d(64, 64, 1)))
    check(conv, torch.randn(2, 64, 3, 3), sparse=1)
    plan = compiled_graphs()[-1].plan

    def refused(model, x, words, plan=plan):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=words):
            torch.compile(model, backend="blocksparse", options={"plan": plan})(x)

    transposed = nn.Sequential(nn.ConvTranspose2d(64, 64, 1))
    grouped = nn.Sequential(nn.Conv2d(128, 64, 1, groups=2))
    for model in (transposed, grouped):
        model[0].weight.data.copy_(conv[0].weight)
    refused(transposed, torch.randn(2, 64, 3, 3), "0: expected .*no kernel for conv_transpose2d")
    refused(grouped, torch.randn(2, 128, 3, 3), "0: expected .*of 2 groups: the plan is for 1")
    refused(
        copy.deepcopy(conv).double(), torch.randn(2, 64, 3, 3).double(), "0: expected .*no kernel for float64"
    )
    refused(conv, torch.randn(2, 64, 3, 3), "kernels: cpu_f32.*no such kernel", plan.with_kernel("0", "gpu"))


def test_weights_on_the_meta_device_stay_dense_with_a_reason(caplog):
    torch._dynamo.reset()
    with torch.no_grad(), torch.device("meta"):
        torch.compile(nn.Linear(64, 64), backend="blocksparse")(torch.randn(2, 64))
    assert "meta" in compiled_graphs()[-1].plan.decisions[0].reason and "failed" not in caplog.text


@torch.no_grad()
def test_batch_norm_with_every_size_dynamic(caplog):
    # Dynamo makes floats such as eps symbolic as well, and restarts when Inductor cannot use them so.
    model = halve(nn.Sequential(nn.Conv1d(64, 64, 1), nn.BatchNorm1d(64)))
    torch._dynamo.reset()
    fast = torch.compile(model, backend="blocksparse", dynamic=True, options={"dense": "never"})
    for shape in ((2, 64, 5), (3, 64, 9)):
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert "failed" not in caplog.text
    (decision,) = compiled_graphs()[-1].plan
    assert not decision.is_dense and decision.site.epilogue == ()
    model[0].weight.mul_(2)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_symbolic_floats_survive_a_recompilation():
    def scaled(self, x):
        return F.linear(x, self.weight) * self.scale + self.shift

    model, x = Model(scaled, scale=0.5, shift=0.25), torch.randn(6, 64)
    torch._dynamo.reset()
    fast = torch.compile(
        model, backend="blocksparse", dynamic=True, fullgraph=True, options={"dense": "never"}
    )
    for scale in (0.5, 0.75):
        model.scale = scale
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        model.weight.mul_(2)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast(x[:4]), model(x[:4]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("block", [32, 8])
def test_a_large_bias_does_not_round_the_products(block):
    model, x = halve(nn.Sequential(nn.Linear(256, 64)), block), torch.randn(64, 256)
    model[0].bias.fill_(100)
    fast = check(model, x, sparse=1)
    exact = copy.deepcopy(model).double()(x.double())
    assert (fast(x) - exact).abs().max() < 1.5 * 2**-18  # rounding a number near 100 once: 2 ** -18


FUSED = """
import torch
from torch import nn
from unittest import mock
from blocksparse_compiler.codegen import inductor_api
conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
net, x = nn.Sequential(conv, nn.ReLU6()).eval(), torch.randn(1, 8, 9, 9)
with torch.no_grad(), inductor_api.capture_sources() as sources:
    with mock.patch.object(inductor_api, "_mkl_is_slow", lambda: True):
        torch.compile(net, backend="blocksparse")(x.to(memory_format=torch.channels_last))
assert "'hardtanh'" in "".join(sources), "dense convolutions lost what oneDNN fuses into them"
"""


def test_choosing_the_linear_library_leaves_fusion_alone(tmp_path):
    """In a process of its own: Inductor registers what oneDNN fuses once."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", FUSED], env=environment, check=True, timeout=120)
