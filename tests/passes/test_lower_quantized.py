"""Which layers on quantized tensors are found, what is put in their place, and what stays as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from quantized_models import S8, U8, Q, Quantized, ResidualNet, dequantize, quantize
from torch import nn
from torch.nn import functional as F

import blocksparse_compiler as bsc
from blocksparse_compiler.devices import device
from blocksparse_compiler.errors import PlanError
from blocksparse_compiler.passes import fold_batch_norm, fold_constants, lower_quantized, lower_sites
from blocksparse_compiler.plan import Plan
from blocksparse_compiler.trace import trace


def planned(model, *inputs, **options):
    """The folded graph, and a plan that goes sparse wherever a kernel exists."""
    gm = trace(model.eval(), *inputs)
    fold_constants(gm)
    fold_batch_norm(gm)
    return gm, bsc.plan(gm, "avx512-2core", **{"allow_dense": False, **options})


def lowered(model, *inputs):
    """The plan, the graph's operators of ours by name, and its result."""
    gm, plan = planned(model, *inputs)
    counts = lower_quantized(gm, plan), lower_sites(gm, plan)
    assert sum(counts) == sum(not d.is_dense for d in plan)
    names = [str(n.target) for n in gm.graph.nodes if str(n.target).startswith("blocksparse")]
    return plan, [name.split(".")[1] for name in names], gm(*inputs)


def image(dtype=U8, channels=64):
    low = 0 if dtype == U8 else -128
    return torch.randint(low, low + 256, (2, channels, 7, 7)).to(dtype)


@pytest.mark.parametrize("dtype", [U8, S8])
def test_a_network(dtype):
    model, x = ResidualNet(dtype), torch.randn(2, 3, 14, 14)
    plan, operators, out = lowered(model, x)
    assert operators == ["quantized_conv", "quantized_conv", "quantized_linear"]
    name = str(dtype).removeprefix("torch.")
    assert [(d.kernel, d.site.dtype) for d in plan] == [("dense", name), *[("cpu_int8", name)] * 3]
    # Sums that are rounded differently may take a neighbouring step of 0.05.
    torch.testing.assert_close(out, model(x), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "layer, x",
    [
        (Quantized(nn.Conv2d(64, 64, 3, padding=1, stride=2), (16, 16), zero_point=3), image()),
        (Quantized(nn.Conv2d(64, 64, 3, padding="same", dilation=2), (16, 16)), image(S8)),
        (Quantized(nn.Conv2d(64, 64, 1, groups=2, bias=False), (16, 16), zero_point=200), image()),
        (Quantized(nn.Conv1d(64, 32, 5), (16, 16)), image().flatten(2)),
        (Quantized(nn.Linear(64, 48), (16, 16), zero_point=9), image().transpose(1, -1)),
        (Quantized(nn.Linear(64, 48, bias=False), (16, 16)), image().flatten(1)[:, :64]),
    ],
    ids=["stride", "dilation", "groups", "conv1d", "linear 4-D", "linear"],
)
def test_a_layer(layer, x):
    plan, operators, out = lowered(layer, x)
    assert [d.kernel for d in plan] == ["cpu_int8"] and operators[0].startswith("quantized_")
    torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-4)


class PerTensor(Quantized):
    def dequantized_weight(self):
        return Q.dequantize_per_tensor.default(self.weight, 0.003, 0, -128, 127, torch.int8)


class BroadcastBias(Quantized):
    def forward(self, x):
        self.bias = torch.ones(1)
        return super().forward(x)


@pytest.mark.parametrize("kind", [PerTensor, BroadcastBias])
def test_other_weights_and_biases(kind):
    layer, x = kind(nn.Linear(64, 64)), image().transpose(1, -1)
    _, operators, out = lowered(layer, x)
    assert operators == ["quantized_linear"]
    torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-4)


class RunTimeScale(Quantized):
    """Dynamic quantization: scale and zero point depend on the input."""

    def forward(self, x):
        x = x.float()
        scale, zero = Q.choose_qparams.tensor(x, 0, 255, 1e-7, U8)
        x = Q.quantize_per_tensor.tensor(x, scale, zero, 0, 255, U8)
        x = Q.dequantize_per_tensor.tensor(x, scale, zero, 0, 255, U8)
        return F.linear(x, self.dequantized_weight(), self.bias)


class InBf16(Quantized):
    def forward(self, x):
        weight = self.dequantized_weight().bfloat16()
        return F.linear(dequantize(x).bfloat16(), weight, self.bias.bfloat16())


class WeightOnly(Quantized):
    def forward(self, x):
        return F.linear(x.float(), self.dequantized_weight(), self.bias)


@pytest.mark.parametrize(
    "layer, kernel, why",
    [
        (RunTimeScale(nn.Linear(64, 64)), "cpu_f32", "known only at run time"),
        (Quantized(nn.Linear(64, 64), weight_zero_point=1), "cpu_f32", "weights have a zero point"),
        (InBf16(nn.Linear(64, 64)), "cpu_bf16", ""),
        (WeightOnly(nn.Linear(64, 64)), "cpu_f32", ""),
    ],
    ids=["run-time scale", "weights with a zero point", "bf16", "weight only"],
)
def test_what_is_not_for_integers_runs_as_before_and_the_plan_says_why(layer, kernel, why):
    x = image().transpose(1, -1)
    plan, operators, out = lowered(layer, x)
    assert [d.kernel for d in plan] == [kernel] and operators == ["linear"]
    assert why in plan.decisions[0].reason and ("; dequantized, as " in plan.decisions[0].reason) == bool(why)
    torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=2e-2 if kernel == "cpu_bf16" else 1e-4)


def test_fp32_serves_where_only_it_can():
    """Scattered weights have no kernel on integers; the plan says so."""
    layer = Quantized(nn.Linear(256, 256), (1, 1), density=0.05)
    x = torch.randint(0, 256, (512, 256)).to(U8)
    plan, operators, out = lowered(layer, x)
    (decision,) = plan
    assert decision.kernel == "cpu_f32_spmm" and decision.site.dtype == "float32" and operators == ["linear"]
    assert "in fp32, as in integers" in decision.reason
    torch.testing.assert_close(out, layer(x), rtol=1e-4, atol=1e-4)
    # With the choice, the dense layer in integers may win, whatever fp32 costs.
    _, plan = planned(layer, x, allow_dense=True)
    assert plan.decisions[0].estimates["dense"] < 1.1 * decision.estimates["dense"]


def test_sums_that_may_overflow_are_left_to_fp32():
    layer = Quantized(nn.Linear(65824, 64), (32, 32), density=1.0)
    layer.weight[:32, :32] = 0
    gm, plan = planned(layer, torch.zeros(1, 65824, dtype=U8))
    assert plan.decisions[0].kernel == "cpu_f32"
    assert "65824 products of 8-bit integers may exceed 32 bits" in plan.decisions[0].reason
    assert lower_quantized(gm, plan) == 0 and lower_sites(gm, plan) == 1


def test_dense_layers_keep_their_integers():
    """For Inductor's own kernels, which need them."""
    gm, plan = planned(ResidualNet(), torch.randn(2, 3, 14, 14), block_shape=(8, 96), allow_dense=True)
    assert all(d.is_dense for d in plan)
    names = [str(node.target) for node in gm.graph.nodes]
    assert sum("dequantize_per_channel" in name for name in names) == 4


def test_a_plan_that_was_saved_is_obeyed():
    layer, x = Quantized(nn.Linear(256, 256), (1, 1), density=0.05), torch.randint(0, 256, (512, 256)).to(U8)
    for model, inputs in ((layer, (x,)), (ResidualNet(), (torch.randn(2, 3, 14, 14),))):
        gm, plan = planned(model, *inputs)
        saved = Plan.from_json(json.loads(json.dumps(plan.to_json())))
        again = bsc.passes.choose_kernels(gm, device("avx512-2core"), plan=saved)
        assert [(d.kernel, d.site.dtype) for d in again] == [(d.kernel, d.site.dtype) for d in plan]


def test_a_plan_for_another_graph_changes_nothing():
    gm, plan = planned(Quantized(nn.Linear(64, 64)), image().transpose(1, -1))
    wrong = Plan((replace(plan.decisions[0], site=replace(plan.decisions[0].site, node="nothing")),))
    before = str(gm.graph)
    with pytest.raises(PlanError, match="a layer of this graph with uint8 input and int8 weights"):
        lower_quantized(gm, wrong)
    assert str(gm.graph) == before


def test_scale_is_that_of_both_operands():
    layer, x = (
        Quantized(nn.Linear(64, 64), scale=0.25, zero_point=128),
        quantize(torch.randn(5, 64), 0.25, 128),
    )
    gm, plan = planned(layer, x)
    lower_quantized(gm, plan)
    torch.testing.assert_close(gm._blocksparse_scale, 0.25 * layer.scales)
