"""permute_channels: same results, dense tiles where channels repeat, and a reason where they cannot move."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockPattern
from blocksparse_compiler.backend import compiled_graphs
from blocksparse_compiler.channel_classes import channel_classes, grouped_order
from blocksparse_compiler.passes import find_sites, fold_batch_norm, fold_constants, permute_channels
from blocksparse_compiler.passes.static_values import StaticValues
from blocksparse_compiler.trace import trace


def conv(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Sequential:
    """Without a bias, and with a norm that differs from channel to channel."""
    norm = nn.BatchNorm2d(outputs)
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options), norm)


class Residual(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(16, 32, stride=stride), conv(32, 32)
        self.shortcut = conv(16, 32, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class Preactivated(nn.Module):
    """Batch norm that no layer absorbs, a depthwise convolution, a squeeze, and a scale per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.norm, self.depthwise = conv(16, 32)[1], nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.down, self.up = nn.Linear(32, 16), nn.Conv2d(16, 32, 1)
        self.scale = nn.Parameter(torch.rand(32, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        y = self.depthwise(F.relu(self.norm(x))) * self.scale + x
        squeezed = F.silu(self.down(F.adaptive_avg_pool2d(y, 1).flatten(1)))
        return self.conv2(y * self.up(squeezed[:, :, None, None]).sigmoid()) + y.clamp(-1, 1)


class Dense(nn.Module):
    """Concatenations of layers' outputs, of an input from outside, and of one tensor with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(16, 32), conv(48, 32), conv(80, 32)
        self.last = conv(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, F.relu(self.conv1(x))], 1)
        x = torch.cat([x, F.relu(self.conv2(x))], 1)
        x = F.relu(self.conv3(F.max_pool2d(x, 2)))
        return self.last(torch.cat([x, x], dim=1)).mean((2, 3))


def classifier() -> nn.Module:
    return nn.Sequential(conv(16, 32), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 10))


BODIES = [
    lambda: Residual(1), lambda: Residual(2), Preactivated, Dense, classifier,
    lambda: nn.Sequential(conv(16, 32), nn.PReLU(32), conv(32, 32)),
    lambda: nn.Sequential(conv(16, 32), nn.ConvTranspose2d(32, 32, 2, stride=2), conv(32, 32, groups=2)),
]  # fmt: skip


def network(body, scheme) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), body()).double().eval()
    return bsc.apply_pattern(model, scheme)


def permuted(model: nn.Module, x: Tensor):
    gm = trace(model, x)
    fold_constants(gm)
    fold_batch_norm(gm)
    return gm, permute_channels(gm)


schemes = st.builds(
    bsc.PeriodicKernels,
    support=st.sampled_from([1, 2, 4]),
    period=st.sampled_from([2, 3, 4, 8]),
    boosted=st.booleans(),
)


@settings(deadline=None, max_examples=25)
@given(body=st.sampled_from(BODIES), scheme=schemes, seed=st.integers(0, 2**16))
def test_outputs_stay_the_same(body, scheme, seed):
    torch.manual_seed(seed)
    model = network(body, scheme)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gm, _ = permuted(model, x)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-11, atol=1e-11)
    assert permute_channels(gm) == 0  # channels that lie together stay as they are


def kept(gm, name: str, shape: tuple[int, int]) -> float:
    """Share of a layer's weight that lies in kept tiles, over the share that is not zero."""
    site = next(s for s in find_sites(gm) if s.name.endswith(name))
    weight = StaticValues(gm).get(next(n for n in gm.graph.nodes if n.name == site.node).args[1])
    return BlockPattern.from_weight(weight, shape).density / float(weight.ne(0).double().mean())


@pytest.mark.parametrize(
    ("body", "features", "layers"),
    [
        (lambda: Residual(2), 512, {"conv1.0": (8, 4), "conv2.0": (8, 8)}),
        (Dense, 16, {"conv1.0": (8, 1), "conv3.0": (8, 1), "last.0": (4, 8)}),
        (Preactivated, 2048, {"conv1": (8, 4), "conv2": (8, 8)}),
    ],
)
def test_scattered_taps_become_dense_tiles(body, features, layers):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(features, 4)).double()
    model = nn.Sequential(network(body, bsc.PeriodicKernels(4, 4)), head)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gm, count = permuted(model, x)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-11, atol=1e-11)
    assert count > 0
    for name, shape in layers.items():
        assert kept(gm, name, shape) == pytest.approx(1), name


def chain() -> nn.Module:
    return nn.Sequential(conv(16, 32), nn.ReLU(), conv(32, 32), nn.ReLU(), conv(32, 4, 1))


def notes(model: nn.Module, x: Tensor) -> dict[str, str]:
    return {d.site.name: d.reason for d in bsc.explain(model, x, dense="never").plan}


def test_the_plan_says_what_was_reordered_and_what_was_not():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    found = notes(network(lambda: Residual(1), bsc.PeriodicKernels(4, 4)).float(), x)
    assert "channels reordered by 4 classes of equal zeros" in found["2.conv1.0"]
    assert "output channels keep their order: they are returned" in found["2.conv2.0"]
    assert "classes" not in found["0"]
    mixed = network(chain, bsc.PeriodicKernels(1, 8)).float()
    bsc.prune_blocks(mixed, (4, 8), 0.5, include="2.4.0")
    assert notes(mixed, x)["2.2.0"].endswith("another layer has zero blocks in this order")
    irregular = network(chain, bsc.PeriodicKernels(1, 8)).float()
    parametrize.remove_parametrizations(irregular[2][2][0], "weight", leave_parametrized=False)
    bsc.apply_pattern(irregular, bsc.PeriodicKernels(1, 7), include="2.2.0")
    assert "layers around them repeat differently" in notes(irregular, x)["2.2.0"]


def test_dense_blocked_and_unstructured_weights_stay_as_they_are():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    for prune in (
        lambda m: m,
        lambda m: bsc.prune_blocks(m, (8, 8), 0.5, include="2.*"),
        lambda m: bsc.prune_blocks(m, (1, 1), 0.2, include="2.*"),
    ):
        body = nn.Sequential(conv(16, 32), nn.ReLU(), conv(32, 32))
        model = prune(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), body))
        assert permuted(model.eval(), x)[1] == 0


def test_a_weight_that_is_zero_by_chance_belongs_to_its_class():
    masks = torch.rand(4, 200) < 0.5
    repeated = masks[torch.arange(64) % 4]
    exact = channel_classes(repeated)
    assert torch.equal(exact, torch.arange(64) % 4)
    repeated[17, repeated[17].nonzero()[0]] = False
    repeated[30] = False  # a dead channel is no such case
    classes = channel_classes(repeated)
    assert classes[17] == classes[1]
    assert int(classes.max()) == 4
    order = grouped_order(repeated, classes)
    assert torch.equal(order.sort().values, torch.arange(64))
    assert len(torch.unique_consecutive(classes[order])) == 5


def test_alike_classes_are_neighbours():
    taps = torch.zeros(4, 8, dtype=torch.bool)
    taps[0, :4], taps[1, 4:], taps[2, :5], taps[3, 3:] = True, True, True, True
    order = grouped_order(taps, torch.arange(4))
    assert order.tolist() in ([0, 2, 3, 1], [0, 2, 1, 3])


def test_the_backend_runs_them_sparse():
    torch.manual_seed(0)
    body = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), *body, nn.Linear(64 * 49, 10)).eval()
    bsc.apply_pattern(model, bsc.PeriodicKernels(2, 4))
    x = torch.randn(2, 3, 14, 14)
    torch._dynamo.reset()
    options = {"dense": "never", "block_shape": (16, 16)}
    fast = torch.compile(model, backend="blocksparse", fullgraph=True, options=options)
    with torch.no_grad():
        out = fast(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert (out - exact).norm() <= 1e-5 * exact.norm()
    plan = compiled_graphs()[-1].plan
    assert [d.is_block_sparse for d in plan] == [False, True, True, False]
    assert all(d.density == pytest.approx(2 / 9) for d in plan if d.is_block_sparse)
