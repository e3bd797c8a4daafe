"""Training on kept tiles: products, gradients, and what the backend makes of masks, scales and folding."""

from __future__ import annotations

import copy
import logging
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockPattern, ranks
from blocksparse_compiler.backend import compiled_graphs
from blocksparse_compiler.pattern import gather_tiles, scatter_tiles
from blocksparse_compiler.scales import block_scales
from blocksparse_compiler.training_tables import LayerTables, gather_indices, kernel_texts
from blocksparse_compiler.variants import KernelConfig

# kernel, stride, padding, dilation, input size, groups
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1), (5, 6), 1),
    ((3, 3), (2, 2), (1, 1), (1, 1), (5, 6), 1),
    ((1, 1), (2, 2), (0, 0), (1, 1), (5, 6), 1),
    ((1, 1), (3, 3), (0, 0), (1, 1), (8, 9), 1),
    ((3, 2), (2, 3), (2, 0), (2, 1), (9, 8), 1),
    ((3, 3), (1, 1), (0, 2), (1, 2), (6, 7), 2),
    ((1, 1), (1, 1), (1, 1), (1, 1), (4, 4), 1),
]


class Sparse(nn.Module):
    """`blocksparse::sparse_conv` (without a kernel size `sparse_linear`) on random tiles."""

    def __init__(self, channels, kernel, stride, padding, dilation, groups, block, dtype=torch.float32):
        super().__init__()
        out_channels, in_channels = channels
        full = BlockPattern.full((out_channels, in_channels // groups, *kernel), block, groups)
        self.pattern = full.with_kept(torch.rand(full.grid_shape) < 0.5)
        self.stride, self.dilation = list(stride), list(dilation)
        self.padding = [p for p in padding for _ in range(2)]
        self.tables = LayerTables.of(self.pattern, stride, self.padding, dilation)
        self.kernel = f"cpu_f32;pattern={self.pattern.digest}"
        self.kernels = kernel_texts(self.tables, [KernelConfig("cpu_f32")] * len(self.tables.phase_patterns))
        self.tiles = nn.Parameter(torch.randn(self.pattern.num_kept, *block, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(out_channels, dtype=dtype))

    def arguments(self, x: Tensor, tiles: Tensor, bias: Tensor) -> tuple[Any, ...]:
        """Of the operator."""
        p, tables = self.pattern, self.tables
        last = (tables.tile_index, tables.groups, tables.all, self.kernel, self.kernels)
        if not p.kernel_size:
            return (x, tiles, bias, p.out_channels, *last)
        geometry = (list(p.kernel_size), self.stride, self.padding, self.dilation)
        return (x, tiles, bias, p.out_channels, *geometry, x.dim() == 4, *last)

    def forward(self, x: Tensor, tiles: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        tiles, bias = self.tiles if tiles is None else tiles, self.bias if bias is None else bias
        ops = torch.ops.blocksparse
        op = ops.sparse_conv if self.pattern.kernel_size else ops.sparse_linear
        return op(*self.arguments(x, tiles, bias))

    def reference(self, x: Tensor, tiles: Tensor, bias: Tensor) -> Tensor:
        weight, kernel = scatter_tiles(tiles, self.pattern), self.pattern.kernel_size
        if not kernel:
            return F.linear(x, weight, bias)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        return conv(x, weight, bias, self.stride, self.padding[::2], self.dilation, self.pattern.groups)


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "size", "groups"), GEOMETRIES)
def test_gradients_are_those_of_the_dense_layer(kernel, stride, padding, dilation, size, groups):
    torch.manual_seed(0)
    layer = Sparse((8, 12), kernel, stride, padding, dilation, groups, (4, 2), torch.float64)
    assert_gradients(layer, torch.randn(2, 12, *size, dtype=torch.float64, requires_grad=True))


def assert_gradients(layer: Sparse, x: Tensor) -> None:
    inputs = (x, layer.tiles, layer.bias)
    out, expected = layer(*inputs), layer.reference(*inputs)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, want)


@st.composite
def sparse_layers(draw: st.DrawFn) -> tuple[Sparse, Tensor]:
    """Any number of dimensions, any geometry; blocks that divide the channels, and blocks that do not."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dims, size, small = draw(st.integers(0, 3)), st.integers(1, 6), st.integers(1, 3)
    groups = draw(st.sampled_from([1, 1, 2])) if dims else 1
    block = draw(small), draw(small)
    if groups == 1:
        channels = draw(st.integers(block[0], 8)), draw(st.integers(block[1], 8))
    else:
        channels = 2 * groups * block[0], groups * block[1]
    kernel, stride, dilation = (tuple(draw(small) for _ in range(dims)) for _ in range(3))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    image = [
        max(draw(size), d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    layer = Sparse(channels, kernel, stride, padding, dilation, groups, block, torch.float64)
    shape = (2, channels[1], *image) if dims else (3, 2, channels[1])
    return layer, torch.randn(shape, dtype=torch.float64, requires_grad=True)


@settings(deadline=None, max_examples=60)
@given(sparse_layers())
def test_gradients_of_any_geometry(drawn):
    assert_gradients(*drawn)


def test_gradcheck():
    torch.manual_seed(0)
    layer = Sparse((4, 4), (3, 3), (2, 1), (1, 1), (1, 1), 1, (2, 2), torch.float64)
    x = torch.randn(1, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x, layer.tiles, layer.bias))
    pattern = layer.pattern
    weight = torch.randn(pattern.weight_shape, dtype=torch.float64, requires_grad=True)

    def tiles(weight: Tensor) -> Tensor:
        return torch.ops.blocksparse.kept_tiles(weight, *gather_indices(pattern), list(pattern.block_shape))

    torch.testing.assert_close(tiles(weight), gather_tiles(weight, pattern))
    assert torch.autograd.gradcheck(tiles, (weight,))


def test_operators_pass_opcheck():
    torch.manual_seed(0)
    layer = Sparse((8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1, (4, 4))
    x, grad = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    ops, pattern = torch.ops.blocksparse, layer.pattern
    geometry = ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1])
    torch.library.opcheck(ops.weight_grad.default, (grad, x, layer.tables.tile_index, [4, 4], *geometry))
    weight = torch.randn(8, 8, 3, 3, requires_grad=True)
    torch.library.opcheck(ops.kept_tiles.default, (weight, *gather_indices(pattern), [4, 4]))
    x.requires_grad_()
    torch.library.opcheck(ops.sparse_conv.default, layer.arguments(x, layer.tiles, layer.bias))
    ragged = Sparse((7, 9), (), (), (), (), 1, (4, 4))
    rows = torch.randn(5, 9, requires_grad=True)
    torch.library.opcheck(ops.sparse_linear.default, ragged.arguments(rows, ragged.tiles, ragged.bias))


class Layers(nn.Module):
    """Independent layers side by side: one compilation for all of them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


def test_kernels_match_float64():
    from blocksparse_compiler.codegen import lowerings

    lowerings.register()
    torch._dynamo.reset()
    torch.manual_seed(0)
    chosen = [*GEOMETRIES[:3], *GEOMETRIES[5:]]
    blocks = [(32, 32), (16, 32), (8, 8), (4, 8), (32, 16)]
    layers = [
        Sparse((64, 96), kernel, stride, padding, dilation, groups, block)
        for (kernel, stride, padding, dilation, _, groups), block in zip(chosen, blocks, strict=True)
    ]
    xs = [torch.randn(3, 96, *size).to(memory_format=torch.channels_last) for *_, size, _ in chosen]
    # Channels that blocks do not divide; one dimension; both in a linear layer.
    layers += [
        Sparse((40, 50), (3, 3), (1, 1), (1, 1), (1, 1), 1, (16, 16)),
        Sparse((32, 32), (5,), (2,), (2,), (1,), 1, (16, 16)),
        Sparse((50, 70), (), (), (), (), 1, (32, 32)),
    ]
    xs += [torch.randn(2, 50, 6, 7), torch.randn(2, 32, 21), torch.randn(2, 3, 70)]
    xs = [x.requires_grad_() for x in xs]
    outs = torch.compile(Layers(layers), fullgraph=True)(xs)
    for layer, x, out in zip(layers, xs, outs, strict=True):
        exact = [t.detach().double().requires_grad_() for t in (x, layer.tiles, layer.bias)]
        expected = layer.reference(*exact)
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, (x, layer.tiles, layer.bias), grad, retain_graph=True)
        want = torch.autograd.grad(expected, exact, grad.double())
        for name, a, b in zip(("out", "x", "tiles", "bias"), (out, *got), (expected, *want), strict=True):
            assert a.shape == b.shape
            assert (a.detach() - b).norm() <= 2e-6 * b.norm(), (layer.pattern, name)


# ---- the backend -----------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions with strides, a residual, dropout and batch norm, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 64, 1, stride=2, bias=False)
        self.conv2, self.norm2 = nn.Conv2d(32, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.norm3 = nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.hidden, self.out = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.norm2(self.conv2(x)))
        x = F.dropout(F.relu(self.norm3(self.conv3(y)) + self.down(x)), 0.0, self.training)
        return self.out(F.relu(self.hidden(x.mean((2, 3)))))


DENSE = ["stem", "out"]


def _masked() -> nn.Module:
    return bsc.apply_pattern(Net(), bsc.RandomBlocks((16, 16), 0.4), exclude=DENSE)


def _folded() -> nn.Module:
    return bsc.fold_zero_blocks(_masked())


def _small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.Flatten(1), nn.Linear(3520, 10)
    )


def _scaled() -> nn.Module:
    model = bsc.insert_block_scales(_small(), (16, 16), include="2")
    with torch.no_grad():
        for _, block_scale in block_scales(model):
            block_scale.scale.copy_(torch.tensor([[0.5, -0.5], [0.0, 1.5]]))
    return bsc.freeze_scales(model)


def _pruned() -> nn.Module:
    model = _small()
    mask = torch.ones(32, 32, 1, 1)
    mask[:16, :16], mask[16:, 16:], mask[:5, 20] = 0, 0, 0
    prune.custom_from_mask(model[2], "weight", mask)
    return model


def train(model: nn.Module, forward, batches=(4, 4, 4), accumulate: int = 1, sizes=(10,)) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    random = torch.Generator().manual_seed(1)
    losses = []
    for i, batch in enumerate(batches):
        size = sizes[i % len(sizes)]
        x = torch.randn(batch, 3, size, size + 1, generator=random).to(memory_format=torch.channels_last)
        loss = F.cross_entropy(forward(x), torch.randint(0, 10, (batch,), generator=random))
        loss.backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _ragged() -> nn.Module:
    """Channels that 16 does not divide, and one dimension."""
    model = nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 40, 3, padding=1), nn.ReLU(), nn.Flatten(2),
        nn.Conv1d(40, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    return bsc.apply_pattern(model, bsc.RandomBlocks((16, 16), 0.4), include=["2", "5"])


def _seeded(make) -> nn.Module:
    torch.manual_seed(0)
    return make()


def compiled(model: nn.Module, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="blocksparse", fullgraph=True, options={"dense": "never", **options})


def plans() -> list:
    return [graph.plan for graph in compiled_graphs()]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items() if t.is_floating_point()}


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(state(model).items(), state(other).values(), strict=True):
        assert (a - b).norm() <= 1e-3 * a.norm() + 1e-5, name


@pytest.mark.parametrize(
    ("make", "sparse"), [(_masked, 4), (_folded, 4), (_scaled, 1), (_pruned, 1), (_ragged, 2)]
)
def test_training_equals_eager_training(make, sparse):
    model, eager = (_seeded(make).to(memory_format=torch.channels_last) for _ in range(2))
    fast = compiled(model)
    how = {"batches": (4, 4, 6, 6), "accumulate": 2, "sizes": (10, 10, 10, 13) if make is _folded else (10,)}
    assert train(model, fast, **how) == pytest.approx(train(eager, eager, **how), rel=1e-4)
    assert_same_state(model, eager)
    plan = plans()[-1]
    assert sum(not d.is_dense for d in plan) == sparse, str(plan)
    assert "trains dense" in plan.decisions[0].reason


@pytest.mark.parametrize("how", [{"gamma": 0.5}, {"target_density": 0.5}], ids=str)
def test_frozen_scales_of_several_ranks_train_on_kept_tiles(how, monkeypatch):
    """The reducers of torch.distributed wait for the gradients of scales, too: they are zeros then."""
    monkeypatch.setattr(ranks, "several", lambda: True)
    models = []
    for _ in range(2):
        model = _seeded(_small)
        sparsifier = bsc.BlockSparsifier(model, (16, 16), include="2", synchronize=False, **how)
        with torch.no_grad():
            sparsifier.layers[0].gate.scale.copy_(torch.tensor([[0.5, -0.5], [0.0, 1.5]]))
        sparsifier.freeze()
        models.append(model)
    model, eager = models
    fast = compiled(model)
    assert train(model, fast) == pytest.approx(train(eager, eager), rel=1e-4)
    assert_same_state(model, eager)
    assert [d.is_dense for d in plans()[-1]] == [True, False, True]
    scale = model[2].parametrizations.weight[0].scale
    assert scale.requires_grad
    fast(torch.randn(4, 3, 10, 11)).sum().backward()
    assert not scale.grad.any()
    sparsifier.load_state_dict({**sparsifier.state_dict(), "frozen": False})
    eager(torch.randn(4, 3, 10, 11)).sum().backward()
    assert eager[2].parametrizations.weight[0].scale.grad.any()  # it learns again


def test_channels_first_and_eval_after_training():
    torch.manual_seed(0)
    model = _folded()
    eager = copy.deepcopy(model)
    fast = compiled(model)
    for m, f in ((model, fast), (eager, eager)):
        train(m, f, batches=(4,))
    assert_same_state(model, eager)
    x = torch.randn(4, 3, 10, 10)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), eager(x), rtol=1e-4, atol=1e-4)
    # In inference the trained weights are frozen into kernels again.
    assert not any("forward and backward" in d.reason for d in plans()[-1])
    assert sum(d.is_block_sparse for d in plans()[-1]) == 4


def test_a_mask_that_changes_is_noticed():
    torch.manual_seed(0)
    model = bsc.apply_pattern(nn.Sequential(nn.Linear(64, 64)), bsc.RandomBlocks((16, 16), 0.5))
    fast, x = compiled(model), torch.randn(8, 64)
    mask, weight = (model[0].parametrizations.weight[0].mask, model[0].parametrizations.weight.original)
    for change in (lambda: None, lambda: mask.logical_not_(), lambda: mask.fill_(True)):
        change()
        for module in (fast, model):
            weight.grad = None
            y = module(x)
            y.square().sum().backward()
            if module is fast:
                out, grad = y, weight.grad
        torch.testing.assert_close(out, y)
        torch.testing.assert_close(grad, weight.grad, rtol=1e-4, atol=1e-3)
    assert all(d.is_dense for d in plans()[-1])  # nothing is masked any more


def test_blocks_of_one_class_keep_their_own_masks():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x))

    blocks = [bsc.apply_pattern(Block(), bsc.RandomBlocks((16, 16), 0.5, seed=i)) for i in range(3)]
    torch._dynamo.reset()
    fast = [torch.compile(b, backend="blocksparse", options={"dense": "never"}) for b in blocks]
    for _ in range(2):
        for block, f in zip(blocks, fast, strict=True):
            x = torch.randn(8, 64)
            torch.testing.assert_close(f(x), block(x))


class Clamped(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.clamp(min=0)


@pytest.mark.parametrize("kind", ["searching", "by chance", "threshold", "bfloat16", "transposed"])
def test_what_training_can_change_stays_dense(kind, caplog):
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(64, 64)
    shape = (2, 64)
    if kind == "transposed":
        layer, shape = nn.ConvTranspose2d(64, 64, 2, stride=2), (2, 64, 4, 4)
    model, x = nn.Sequential(layer), torch.randn(shape)
    if kind == "searching":
        bsc.insert_block_scales(model, (16, 16))
        with torch.no_grad():
            next(block_scales(model))[1].scale[:2] = -0.5
    elif kind == "threshold":
        with torch.no_grad():
            layer.weight[:32] = -1
        parametrize.register_parametrization(layer, "weight", Clamped())
    else:
        bsc.prune_blocks(model, (16, 16), 0.5)
    if kind == "transposed":
        bsc.fold_zero_blocks(model)
    if kind == "bfloat16":
        model, x = bsc.fold_zero_blocks(model).bfloat16(), x.bfloat16()
    fast = compiled(model)
    with caplog.at_level(logging.INFO, "blocksparse_compiler"):
        fast(x).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-2 if kind == "bfloat16" else 1e-4, atol=1e-3)
    assert all(d.is_dense for d in plans()[-1])
    assert "trains dense" in caplog.text


def test_autocast_on_a_cpu_trains_dense_and_says_why(caplog):
    torch.manual_seed(0)
    model = bsc.apply_pattern(nn.Sequential(nn.Linear(64, 64)), bsc.RandomBlocks((16, 16), 0.5))
    fast, x, gradients = compiled(model), torch.randn(8, 64), []
    for run in (model, fast):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), caplog.at_level(logging.INFO, "blocksparse_compiler"):
            run(x).float().square().sum().backward()
        gradients.append(model[0].parametrizations.weight.original.grad.clone())
    torch.testing.assert_close(*gradients, rtol=3e-2, atol=3e-2 * float(gradients[0].abs().max()))
    mask = model[0].parametrizations.weight[0].mask
    assert not gradients[1][~mask].any()
    assert "no kernels for gradients of bfloat16 on cpu, which autocast computes in" in caplog.text


def test_a_plan_and_the_cost_model_can_keep_layers_dense():
    torch.manual_seed(0)
    model = _folded()
    train(model, compiled(model), batches=(4,))
    plan = plans()[-1].with_kernel("conv2", "dense")
    train(model, compiled(model, plan=plan), batches=(4,))
    assert plans()[-1]["conv2"].reason == "trains dense: the plan says so"
    assert not plans()[-1]["conv3"].is_dense
    nearly_full = bsc.apply_pattern(nn.Sequential(nn.Conv2d(64, 64, 3)), bsc.RandomBlocks((8, 8), 0.9))
    compiled(nearly_full, dense="auto")(torch.randn(8, 64, 16, 16)).sum().backward()
    (decision,) = plans()[-1]
    assert decision.is_dense
    assert "forward and backward" in decision.reason


@pytest.mark.parametrize("make", [_masked, _folded, _scaled])
def test_explain_says_what_trains_on_kept_tiles(make):
    model = _seeded(make)
    explanation = bsc.explain(model, torch.randn(4, 3, 10, 11), dense="never", training=True)
    train(model, compiled(model), batches=(4,))
    for told, done in zip(explanation.plan, plans()[-1], strict=True):
        assert (told.site.name, told.pattern, told.reason) == (done.site.name, done.pattern, done.reason)
    assert "forward and backward" in str(explanation.to_json())
    on_gpu = bsc.explain(model, torch.randn(4, 3, 10, 11), device="h200", training=True)
    assert any("forward and backward" in d.reason for d in on_gpu.plan)
