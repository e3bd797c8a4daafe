"""Layers whose plan says so become one kernel, and stay right where they cannot."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from chain_models import Block, chains, check, deep, lowered, planned, point, residuals, separable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blocksparse_compiler import Plan
from blocksparse_compiler.layer_chain import MEMBER, Depthwise, Pointwise

OPS = torch.ops.blocksparse


def count(gm: torch.fx.GraphModule, *targets) -> int:
    return sum(len(gm.graph.find_nodes(op="call_function", target=target)) for target in targets)


def alone(gm: torch.fx.GraphModule) -> int:
    """Layers on kernels of their own."""
    return count(gm, OPS.conv.default, OPS.depthwise.default)


@pytest.mark.parametrize(
    "activation, name",
    [
        (nn.ReLU6(), "clamp:0.0:6.0"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.Hardswish(), "hardswish"),
        (nn.SiLU(), "silu"),
        (nn.Hardtanh(-2.0, 1.5), "clamp:-2.0:1.5"),
        (nn.Identity(), "identity"),
    ],
)
def test_blocks_with_residuals_are_one_kernel(activation, name):
    model, x = residuals(activation=activation), torch.randn(1, 32, 14, 14)
    gm, plan = lowered(model, x)
    (chain,) = chains(gm)
    assert alone(gm) == 0 and [len(names) for names in planned(plan)] == [9]
    assert [str(layer.activation) for layer in chain.layers] == [name, name, "identity"] * 3
    assert [layer.adds for layer in chain.layers if isinstance(layer, Pointwise)] == [
        None, 0, None, 3, None, None,
    ]  # fmt: skip
    assert [type(layer) for layer in chain.layers] == [Pointwise, Depthwise, Pointwise] * 3
    check(gm, model, x)


def test_constants_of_single_layers_are_gone():
    gm, _ = lowered(residuals(), torch.randn(1, 32, 14, 14))
    assert len(list(gm.buffers())) == 5, "values, row_ptr, tile_index, filters, biases"


def test_constants_are_fp32_whatever_the_default():
    model, x = residuals(), torch.randn(1, 32, 14, 14)
    torch.set_default_dtype(torch.float64)
    try:
        gm, _ = lowered(model, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert chains(gm) and {b.dtype for b in gm.buffers()} == {torch.float32, torch.int32}


def test_depthwise_first_and_several_images():
    model, x = separable(), torch.randn(3, 32, 15, 13).to(memory_format=torch.channels_last)
    gm, _ = lowered(model, x)
    (chain,) = chains(gm)
    assert alone(gm) == 0 and [layer.height for layer in chain.layers[1::2]] == [4, 1]
    check(gm, model, x)
    assert gm(x).stride() == model(x).stride()


def test_an_activation_of_the_sum_belongs_to_it():
    model, x = residuals(after=nn.ReLU()), torch.randn(1, 32, 14, 14)
    gm, _ = lowered(model, x)
    (chain,) = chains(gm)
    assert [str(layer.activation) for layer in chain.layers[2::3]] == ["relu"] * 3
    check(gm, model, x)


def test_an_activation_before_the_sum_ends_a_chain():
    model, x = residuals(before=nn.ReLU()), torch.randn(1, 32, 14, 14)
    gm, _ = lowered(model, x)
    assert [len(chain.layers) for chain in chains(gm)] == [3, 3, 3] and alone(gm) == 0
    check(gm, model, x)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Sigmoid(), nn.Hardtanh(0.0, float("inf"))])
def test_other_activations_end_a_chain(activation):
    model, x = residuals(activation=activation), torch.randn(1, 32, 14, 14)
    gm, _ = lowered(model, x)
    assert not chains(gm) and alone(gm) == 9
    check(gm, model, x)


class Steps(nn.Module):
    """Layers by name, in an order that `run` knows."""

    def __init__(self, run, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.run = nn.ModuleDict(layers), run
        self.eval()

    def forward(self, *inputs: Tensor):
        return self.run(*self.layers.values(), *inputs)


def steps(run, *layers: nn.Module) -> nn.Module:
    return Steps(run, **{f"layer{i}": layer for i, layer in enumerate(layers)})


def three(run) -> nn.Module:
    return steps(run, point(32, 48), deep(48), point(48, 32))


def five(run) -> nn.Module:
    return steps(run, deep(32), point(32, 48), point(48, 32), deep(32), point(32, 48))


X = torch.randn(2, 32, 9, 9)

CASES = {
    "hidden is returned": (five(lambda a, b, c, d, e, x: ((y := c(b(a(x).relu()))), e(d(y)))), [3, 2]),
    "hidden is read by others": (three(lambda a, b, c, x: c(b(y := a(x).relu())).mean() + y.sum()), [2]),
    "input is read by others": (three(lambda a, b, c, x: c(b(a(x).relu())) * x), [3]),
    "input is added": (three(lambda a, b, c, x: x + c(b(a(x)))), [3]),
    "input is added twice": (three(lambda a, b, c, x: torch.add(c(b(a(x))), x, alpha=2)), [3]),
    "other tensor is added": (three(lambda a, b, c, x: x.cos() + c(b(a(x)))), [3]),
    "own output is added": (three(lambda a, b, c, x: (y := c(b(a(x)))) + y), [3]),
    "bias is added": (three(lambda a, b, c, x: c(b(a(x))) + x.mean((2, 3), keepdim=True)), [3]),
    "input is written to": (three(lambda a, b, c, x: x.add_(c(b(a(x))))), [3]),
    "input changes before the sum": (three(lambda a, b, c, x: c(b(a(y := x * 2))) + y.mul_(3)), [3]),
    "input changes in between": (three(lambda a, b, c, x: _written_between(a, b, c, x)), [3]),
    "hidden is written to": (three(lambda a, b, c, x: c(b(a(x).mul_(2)))), [2]),
    "strided": (steps(lambda a, b, c, x: c(b(a(x))), point(32, 32), point(32, 32, stride=2), deep(32)), []),
    "grouped": (steps(lambda a, b, c, x: c(b(a(x))), point(32, 32), point(32, 32, groups=2), deep(32)), []),
    "dilated": (three(lambda a, b, c, x: c(b(a(x)))), [3]),
    "two readers": (three(lambda a, b, c, x: c(b(y := a(x)) + y)), []),
}
CASES["dilated"][0].layers["layer1"].dilation = (2, 2)


def _written_between(a, b, c, x):
    y = x * 2
    z = a(y)
    y.mul_(3)
    return c(b(z)) + y


@pytest.mark.parametrize("name", CASES)
def test_what_stands_around_a_chain(name):
    model, lengths = CASES[name]
    gm, plan = lowered(model, X)
    assert [len(chain.layers) for chain in chains(gm)] == lengths
    assert [len(names) for names in planned(plan)] == lengths
    check(gm, model, X)
    adds = {layer.adds for chain in chains(gm) for layer in chain.layers if isinstance(layer, Pointwise)}
    assert adds - {None} == ({0} if name == "input is added" else set())


def test_sums_in_place_are_sums():
    def run(a, b, c, d, x):
        y = a(x)
        y += c(b(y))
        return d(y)

    model = steps(run, point(32, 32), deep(32), point(32, 32), deep(32))
    gm, _ = lowered(model, X)
    (chain,) = chains(gm)
    assert chain.layers[2].adds == 1
    check(gm, model, X)


# ---- plans that do not fit --------------------------------------------------------------------------


def test_a_plan_for_another_graph_leaves_layers_alone(caplog):
    layers = [point(32, 48), deep(48), point(48, 32)]
    before = steps(lambda a, b, c, x: c(b(a(x))), *layers)
    after = steps(lambda a, b, c, x: c(b(y := a(x))) + y.mean(), *layers)
    _, plan = lowered(before, X)
    assert planned(plan)
    gm, obeyed = lowered(after, X, plan=plan)
    assert obeyed["layers.layer0"].config == plan["layers.layer0"].config
    assert not chains(gm) and alone(gm) == 3
    assert "run one by one" in caplog.text and "layers.layer0, layers.layer1" in caplog.text
    assert not any("chain" in str(node.args[-1]) for node in gm.graph.nodes if node.args)
    check(gm, after, X)


def test_a_layer_that_the_user_takes_out_leaves_the_others_alone():
    model = separable()
    x = torch.randn(1, 32, 14, 14)
    _, plan = lowered(model, x)
    gm, _ = lowered(model, x, plan=plan.with_kernel("2", "dense"))
    assert not chains(gm) and alone(gm) == 3
    check(gm, model, x)


def test_strides_that_no_chain_has():
    """A plan may put any layer into a chain."""
    model = steps(lambda a, b, c, x: c(b(a(x))), point(32, 48), deep(48, (1, 5)), point(48, 32))
    x = torch.randn(1, 32, 4, 85)
    _, plan = lowered(model, x)
    config = {MEMBER: 0, "bands": 2}
    chained = (replace(d, config={**d.config, **config}) for d in plan)
    gm, _ = lowered(model, x, plan=replace(plan, decisions=tuple(chained)))
    assert not chains(gm) and alone(gm) == 3
    check(gm, model, x)


@pytest.mark.parametrize("bands", [0, -2, 2.5, "two"])
def test_bands_of_an_edited_plan_that_are_none(bands, caplog):
    model = steps(lambda a, b, c, x: c(b(a(x))), point(32, 48), deep(48), point(48, 32))
    _, plan = lowered(model, X)
    one, *others = plan
    edited = dataclasses.replace(one, config={**one.config, "bands": bands})
    gm, _ = lowered(model, X, plan=Plan((edited, *others)))
    assert planned(plan) and not chains(gm) and alone(gm) == 3
    assert "run one by one" in caplog.text
    check(gm, model, X)


def test_a_saved_plan_gives_the_same_chains():
    model, x = residuals(), torch.randn(1, 32, 14, 14)
    gm, plan = lowered(model, x)
    again, _ = lowered(model, x, plan=Plan.from_json(json.loads(json.dumps(plan.to_json()))))
    assert chains(again) == chains(gm)
    assert [str(node.args[-1]) for node in again.graph.nodes if "layer_chain" in node.name] == [
        str(node.args[-1]) for node in gm.graph.nodes if "layer_chain" in node.name
    ]


# ---- any network ------------------------------------------------------------------------------------


class Program(nn.Module):
    """Steps that each read earlier values, 0 being the input; some values are returned."""

    def __init__(self, program: list[tuple[str, int, int]], returned: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.program, self.returned = program, returned
        made = {"point": lambda: point(16, 16), "deep": lambda: deep(16), "block": lambda: Block(16, 16, 32)}
        self.layers = nn.ModuleList(made.get(kind, nn.Identity)() for kind, _, _ in program)

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for (kind, a, b), layer in zip(self.program, self.layers, strict=True):
            if kind == "add":
                values.append(values[a] + values[b])
            elif kind == "iadd":
                values.append(values[a].add_(values[b]) if a else values[a] + values[b])
            else:
                values.append(getattr(values[a], kind)() if kind in ("relu", "cos") else layer(values[a]))
        return [values[-1], *(values[i].clone() for i in self.returned)]


@st.composite
def programs(draw):
    kinds = st.sampled_from(("point", "deep", "point", "deep", "relu", "add", "add", "iadd", "block", "cos"))
    drawn = draw(st.lists(kinds, min_size=2, max_size=10))
    program = []
    for i, kind in enumerate(drawn):
        earlier = draw(st.integers(max(0, i - 4), i))
        program.append((kind, i, earlier) if kind != "iadd" else (kind, earlier, i))
    return program, draw(st.lists(st.integers(1, len(drawn)), max_size=1))


@settings(deadline=None, max_examples=25)
@given(programs(), st.integers(1, 3))
def test_every_planned_chain_is_fused_and_right(program, images):
    model = Program(*program).eval()
    x = torch.randn(images, 16, 7, 6)
    gm, plan = lowered(model, x)
    assert sorted(len(chain.layers) for chain in chains(gm)) == sorted(map(len, planned(plan)))
    check(gm, model, x)
