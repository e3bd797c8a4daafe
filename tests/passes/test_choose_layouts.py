"""Which regions lie channels first: against all labellings of small graphs, and compiled, in both layouts."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import itertools
import json
import operator
import re
from unittest.mock import patch

import pytest
import torch
from chain_models import no_chains  # noqa: F401
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import compiling
from layer_cases import FIXED
from torch import Tensor, nn

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockPattern, Plan, cost, trace
from blocksparse_compiler.backend import compiled_graphs
from blocksparse_compiler.candidate_cost import MARGIN
from blocksparse_compiler.layouts import CHANNELS_LAST, Layouts
from blocksparse_compiler.passes.choose_kernels import choose_kernels
from blocksparse_compiler.passes.choose_layouts import choose_layouts
from blocksparse_compiler.plan import DENSE
from blocksparse_compiler.tables import Totals

pytestmark = pytest.mark.usefixtures("no_chains")  # which would leave few layouts to choose

# The function of this name hides its module.
MODULE = importlib.import_module("blocksparse_compiler.passes.choose_layouts")
WAYS = importlib.import_module("blocksparse_compiler.passes.layer_ways")
CHANNELS = 32
LAYERS = ("point", "deep", "dense")


def layer(kind: str, channels: int = CHANNELS, out_channels: int | None = None) -> nn.Module:
    if kind == "point":
        return bsc.prune_blocks(nn.Conv2d(channels, out_channels or channels, 1), (1, 1), 0.1)
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels if kind == "deep" else 1)


class Net(nn.Module):
    """Steps that each read earlier values, 0 being the input; the last value is returned."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(layer(kind) if kind in LAYERS else nn.Identity() for kind, _, _ in steps)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for (kind, a, b), layer in zip(self.steps, self.layers, strict=True):
            one, other = values[a], values[b]
            if kind in LAYERS:
                values.append(layer(one))
            else:
                values.append(one.relu() if kind == "relu" or a == b else one + other)
        return values[-1]


@st.composite
def nets(draw):
    """Chains with skips: each step reads the last value, and maybe an earlier one."""
    kinds = draw(st.lists(st.sampled_from((*LAYERS, "point", "relu", "add")), min_size=2, max_size=8))
    return [(kind, i, draw(st.integers(0, i)) if kind == "add" else i) for i, kind in enumerate(kinds)]


DEVICES = st.builds(
    functools.partial(dataclasses.replace, FIXED),
    transpose_seconds_per_vector=st.floats(1e-10, 5e-8),
    sparse_call_seconds=st.floats(1e-7, 1e-5),
    dense_conv_call_seconds=st.floats(1e-7, 4e-5),
)


@settings(deadline=None, max_examples=40)
@given(nets(), DEVICES, st.integers(5, 33), st.booleans())
def test_no_labelling_costs_less(steps, device, size, channels_last):
    torch.manual_seed(0)
    x = torch.randn(2, CHANNELS, size, size)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    gm = trace(Net(steps).eval(), x)
    before = choose_kernels(gm, device)
    # Take whatever saves; layers that share a kernel have no cost of their own to check against.
    alone = patch.object(WAYS, "_fusible_layers", lambda *_: iter(()))
    with patch.object(MODULE, "MARGIN", 1.0), alone:
        after = choose_layouts(gm, before, device)
    reckoning = Reckoning(gm, before, device)
    assume(reckoning.is_exact())
    chosen = {d.site.node: (d.kernel, Layouts.of(d.config)) for d in after}
    assert reckoning.cheapest(chosen) == pytest.approx(reckoning.cheapest(), rel=1e-9)
    assert reckoning.cheapest() <= reckoning.cheapest(all_last(before)) * (1 + 1e-9)


def all_last(plan: Plan) -> dict[str, tuple[str, Layouts]]:
    return {d.site.node: (d.kernel, CHANNELS_LAST) for d in plan}


class Reckoning:
    """What a graph of `Net` costs, by trying every layout of every tensor; all tensors are of one size."""

    def __init__(self, gm, plan, device) -> None:
        self.nodes = list(gm.graph.nodes)
        self.x = next(n for n in self.nodes if n.op == "placeholder")
        self.x_first = self.x.meta["val"].is_contiguous()
        self.decisions = {d.site.node: d for d in plan}
        self.device = device
        self.weights = {
            n.name: operator.attrgetter(n.args[1].target)(gm) for n in self.nodes if n.name in self.decisions
        }
        elements = self.x.meta["val"].numel()
        rate = device.transpose_seconds_per_vector / device.vector_lanes / device.threads
        l2 = device.threads * device.l2_bytes_per_thread
        assert 12 * elements <= l2
        moved = 12 * elements / (device.threads * device.l2_bytes_per_second_per_thread)
        self.copy = elements * rate + moved + device.sparse_call_seconds

    def cheapest(self, chosen: dict[str, tuple[str, Layouts]] | None = None) -> float:
        """The least over all labels; with these kernels in their layouts, or with the best."""
        tensors = [n for n in self.nodes if n.op == "call_function" or n.op == "call_method"]
        ways = {name: self.ways(d) for name, d in self.decisions.items()}
        for name, way in (chosen or {}).items():
            ways[name] = {way: ways[name][way]}
        totals = []
        for labels in itertools.product((False, True), repeat=len(tensors)):
            first = {self.x: self.x_first, **dict(zip(tensors, labels, strict=True))}
            totals.append(sum(self.seconds(node, first, ways) for node in self.nodes))
        return min(totals)

    def is_exact(self) -> bool:
        """Whether no layer runs cheaper with different layouts than with equal ones: a cut is exact then."""

        def between(name: str, reads: bool, writes: bool) -> float:
            copies = (
                s + self.copy * ((w.reads_first != reads) + (w.writes_first != writes))
                for (_, w), s in self.ways(self.decisions[name]).items()
            )
            return min(copies)

        equal = {n: between(n, False, False) + between(n, True, True) for n in self.decisions}
        mixed = {n: between(n, False, True) + between(n, True, False) for n in self.decisions}
        return all(equal[n] <= mixed[n] + 1e-12 for n in self.decisions)

    def seconds(self, node, first, ways) -> float:
        if node.op == "output":
            (returned,) = node.all_input_nodes
            return self.copy * (first[returned] != self.x_first)  # eager's strides are the input's
        if node not in first or node is self.x:
            return 0.0
        operands = [n for n in node.all_input_nodes if n in first]
        if node.name not in ways:
            return sum(self.copy * (first[operand] != first[node]) for operand in operands)
        return min(
            seconds
            + self.copy * (layouts.reads_first != first[operands[0]])
            + self.copy * (layouts.writes_first != first[node])
            for (_, layouts), seconds in ways[node.name].items()
        )

    def pattern(self, decision) -> BlockPattern:
        """In the blocks that are best channels last."""
        scattered = [label for label in decision.estimates if label.startswith("cpu_f32_spmm ")]
        if not scattered:
            return decision.pattern
        best = min(scattered, key=decision.estimates.__getitem__)
        height = int(best.removeprefix("cpu_f32_spmm ").removesuffix("x1"))
        return BlockPattern.from_weight(self.weights[decision.site.node], (height, 1), 1)

    def ways(self, decision) -> dict[tuple[str, Layouts], float]:
        """Seconds of every kernel in the layouts that it knows."""
        found = {(decision.kernel, CHANNELS_LAST): decision.estimates[decision.kernel]}
        found[DENSE, CHANNELS_LAST] = MARGIN * decision.estimates[DENSE]  # as kernels are chosen
        for reads, writes in itertools.product((False, True), repeat=2):
            layouts = Layouts(reads, writes)
            for kernel in ("cpu_f32_spmm", "cpu_f32_depthwise"):
                if kernel in decision.estimates and (kernel == "cpu_f32_spmm" or reads == writes):
                    found[kernel, layouts] = cost.sparse_cost(
                        decision.site, self.pattern(decision), self.device, kernel, config=layouts.parameters
                    ).evaluate()
        return found


# ---- decisions -----------------------------------------------------------------------------------------

NCHW, NHWC = torch.contiguous_format, torch.channels_last
DEAR = dataclasses.replace(FIXED, threads=1, transpose_seconds_per_vector=4e-9)
"""A CPU on which transposes decide."""


class InvertedResiduals(nn.Module):
    """A mobile network's stem, two blocks with a skip, a last convolution and pooling."""

    def __init__(self, channels: int = 32, kept: float = 0.1, pooled: bool = True) -> None:
        super().__init__()

        def point(inputs: int, outputs: int) -> nn.Module:
            return bsc.prune_blocks(nn.Conv2d(inputs, outputs, 1, bias=False), (1, 1), kept)

        def block(width: int) -> nn.Module:
            deep = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            steps = [point(channels, width), nn.BatchNorm2d(width), nn.ReLU6(), deep, nn.BatchNorm2d(width)]
            return nn.Sequential(*steps, nn.ReLU6(), point(width, channels), nn.BatchNorm2d(channels))

        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU6(), point(channels, channels))
        self.blocks = nn.ModuleList(block(4 * channels) for _ in range(2))
        self.last = nn.Sequential(point(channels, 4 * channels), nn.ReLU6())
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        x = self.last(x)
        return x.mean((2, 3)) if self.pooled else x


def mobile(pooled: bool = True, **kwargs) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = InvertedResiduals(pooled=pooled, **kwargs).eval()
    return net, torch.randn(1, 3, 32, 32)


def layouts(plan: Plan) -> dict[str, str]:
    return {d.site.name: str(Layouts.of(d.config)) for d in plan}


def test_a_mobile_network_lies_channels_first_behind_its_stem():
    net, x = mobile()
    plan = bsc.plan(trace(net, x), DEAR)
    found = layouts(plan)
    assert found.pop("stem.0") == "last" and found.pop("stem.2") == "last → first"
    assert set(found.values()) == {"first"}
    assert "channels first, as its neighbours: saves" in plan["blocks.1.0"].reason
    before = choose_kernels(trace(net, x), DEAR)
    assert Totals.of(plan).chosen < 0.95 * Totals.of(before).chosen, "transposes are saved"
    table = str(plan)
    assert "layout" in table and "last → first" in table


def test_dense_networks_are_left_alone():
    net, x = mobile(kept=1.0)
    plan = bsc.plan(trace(net, x), DEAR)
    assert not any("reads" in d.config or "writes" in d.config for d in plan)
    assert "layout" not in str(plan)


def test_a_region_that_saves_little_stays_channels_last():
    net, x = mobile()
    cheap = dataclasses.replace(FIXED, transpose_seconds_per_vector=1e-11)
    before = choose_kernels(trace(net, x), cheap)
    assert any(d.kernel == "cpu_f32_spmm" for d in before)
    assert choose_layouts(trace(net, x), before, cheap) == before


def test_a_dense_layer_goes_sparse_where_its_neighbours_lie_channels_first():
    net, x = mobile()
    gm = trace(net, x)
    before = choose_kernels(gm, DEAR)
    old = before["blocks.1.0"]
    barely = {**old.estimates, DENSE: 1.01 * old.estimates[old.kernel]}
    dense = dataclasses.replace(old, kernel=DENSE, reason="stays dense: so", config={}, estimates=barely)
    edited = dataclasses.replace(before, decisions=tuple(dense if d is old else d for d in before))
    new = choose_layouts(gm, edited, DEAR)["blocks.1.0"]
    assert new.kernel == "cpu_f32_spmm" and Layouts.of(new.config) == Layouts(True, True)
    assert "stays dense" not in new.reason and "pixels" in new.config


def test_measured_layers_keep_their_scale():
    net, x = mobile()
    gm = trace(net, x)
    before = choose_kernels(gm, DEAR)
    double = tuple(
        dataclasses.replace(d, measured=True, estimates={k: 2 * s for k, s in d.estimates.items()})
        for d in before
    )
    once = choose_layouts(gm, before, DEAR)
    twice = choose_layouts(gm, dataclasses.replace(before, decisions=double), DEAR)
    for one, two in zip(once, twice, strict=True):
        assert (one.kernel, one.config) == (two.kernel, two.config)
        assert two.estimates[two.kernel] == pytest.approx(2 * one.estimates[one.kernel])
    assert "measured" in twice["blocks.1.0"].reason


@pytest.mark.parametrize("what", ["bf16", "dynamic pixels", "GPU"])
def test_elsewhere_everything_stays_channels_last(what):
    net, x = mobile()
    device = DEAR
    if what == "bf16":
        net, x = net.bfloat16(), x.bfloat16()
    if what == "GPU":
        device = "h200"
    gm = trace(net, x)
    if what == "dynamic pixels":
        dim = torch.export.Dim
        pixels = {2: dim("h", min=8, max=512), 3: dim("w", min=8, max=512)}
        gm = torch.export.export(net, (x,), dynamic_shapes=(pixels,)).module()
    assert set(layouts(bsc.plan(gm, device)).values()) == {"last"}


def test_a_dynamic_batch_may_lie_channels_first():
    net, x = mobile()
    batch = {0: torch.export.Dim("n", min=1, max=64)}
    gm = torch.export.export(net, (x.expand(2, -1, -1, -1),), dynamic_shapes=(batch,)).module()
    assert "first" in layouts(bsc.plan(gm, DEAR)).values()


# ---- compiled ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
def test_compiled_networks_are_right_and_have_the_strides_of_eager(memory_format, pooled):
    net, x = mobile(pooled)
    x = x.to(memory_format=memory_format)
    net = net.to(memory_format=memory_format)
    plan = Plan.from_json(json.loads(json.dumps(bsc.plan(trace(net, x), DEAR).to_json())))
    assert "first" in layouts(plan).values()
    torch._dynamo.reset()
    fast = torch.compile(net, backend="blocksparse", fullgraph=True, options={"plan": plan})
    out, eager = fast(x), net(x)
    exact = copy.deepcopy(net).double()(x.double())
    assert (out - exact).norm() <= 1.5 * (eager - exact).norm() + 2.0**-21 * exact.norm()
    assert out.stride() == eager.stride()
    assert layouts(compiled_graphs()[-1].plan) == layouts(plan), "a plan that is given is obeyed"


class Gated(nn.Module):
    """Squeeze-and-excite: pooling and the product read the activation, so Inductor materialises it."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = layer("point", 32, 64), layer("point", 64, 32)
        self.gate = nn.Conv2d(64, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.expand(x))
        return x + self.project(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())


@torch.no_grad()
def test_no_kernel_copies_within_a_region():
    """What Inductor writes between kernels that lie channels first does so, too."""
    torch.manual_seed(0)
    # Inductor knows a dense convolution only by the activation that it fuses.
    stem = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU())
    net = nn.Sequential(stem, layer("point"), Gated(), Gated(), layer("point")).eval()
    x = torch.randn(1, 8, 16, 16)
    plan = bsc.plan(trace(net, x), DEAR)
    assert layouts(plan)["2.expand"] == layouts(plan)["3.project"] == "first"
    with compiling(cpp_wrapper=False) as sources:
        fast = torch.compile(net, backend="blocksparse", fullgraph=True, options={"plan": plan})
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    text = "\n".join(sources)
    strides = re.findall(r"empty_strided_cpu\(\(1, (?:32|64), 16, 16\), \((.*?)\)", text)
    assert set(strides) == {"8192, 256, 16, 1", "16384, 256, 16, 1"}
