"""Training on GPU kernels: all three products of a step, run by Triton's interpreter and cross-compiled."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import blocksparse_compiler as bsc
from blocksparse_compiler import BlockPattern, devices, training_graph
from blocksparse_compiler.backend import compiled_graphs
from blocksparse_compiler.codegen import offline
from blocksparse_compiler.pattern import scatter_tiles
from blocksparse_compiler.training_tables import LayerTables, kernel_texts
from blocksparse_compiler.variants import KernelConfig

pytest.importorskip("triton")

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """A layer; `input_shape` is `[N, C, *spatial]` or `[*rows, C]`, geometry as of `nn.Conv2d`."""

    input_shape: tuple[int, ...]
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    block: tuple[int, int] = (16, 16)
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    density: float = 0.5
    dtype: torch.dtype = BFLOAT
    pixels: int = 32
    warps: int = 4


class Layer:
    """`blocksparse::sparse_conv` or `sparse_linear` on random tiles, and plain torch beside it."""

    def __init__(self, case: Case) -> None:
        self.case, dims = case, len(case.kernel_size)
        channels = case.input_shape[1 if dims else -1] // case.groups
        full = BlockPattern.full((case.out_channels, channels, *case.kernel_size), case.block, case.groups)
        self.pattern = pattern = full.with_kept(torch.rand(full.grid_shape) < case.density)
        self.stride, self.dilation = [case.stride] * dims, [case.dilation] * dims
        self.padding = [case.padding] * (2 * dims)
        precision = {"precision": "ieee"} if case.dtype == FLOAT else {}
        kernel = KernelConfig(
            "triton_gather", {"pixels": case.pixels, "warps": case.warps, "stages": 3, **precision}
        )
        self.tables = LayerTables.of(pattern, self.stride, self.padding, self.dilation, "triton_gather")
        self.kernel = kernel.encode(pattern)
        self.kernels = kernel_texts(self.tables, [kernel] * len(self.tables.phase_patterns))
        tiles = torch.randn(pattern.num_kept, *case.block) / (channels * max(1, pattern.num_taps)) ** 0.5
        self.inputs = [torch.randn(case.input_shape), tiles, torch.randn(case.out_channels)]
        self.inputs = [t.to(case.dtype) for t in self.inputs]
        if dims == 2:
            self.inputs[0] = self.inputs[0].to(memory_format=torch.channels_last)
        self.grad = torch.randn(self.reference(*self.inputs).shape).to(case.dtype)
        if dims == 2:
            self.grad = self.grad.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, tiles: Tensor, bias: Tensor) -> Tensor:
        p, tables = self.pattern, self.tables
        rest = (tables.tile_index, tables.groups, tables.all, self.kernel, self.kernels)
        if not p.kernel_size:
            return torch.ops.blocksparse.sparse_linear(x, tiles, bias, p.out_channels, *rest)
        geometry = (list(p.kernel_size), self.stride, self.padding, self.dilation)
        last = len(p.kernel_size) == 2
        return torch.ops.blocksparse.sparse_conv(x, tiles, bias, p.out_channels, *geometry, last, *rest)

    def reference(self, x: Tensor, tiles: Tensor, bias: Tensor) -> Tensor:
        weight, p = scatter_tiles(tiles, self.pattern), self.pattern
        if not p.kernel_size:
            return F.linear(x, weight, bias)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(p.kernel_size) - 1]
        return conv(x, weight, bias, self.stride, self.padding[::2], self.dilation, p.groups)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    with torch.backends.cudnn.flags(allow_tf32=True):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


def step(function, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of input, tiles and bias."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def generate(layers: Sequence[Layer], target: str = "sm_90") -> offline.OfflineProgram:
    """One program with the training steps of all layers."""

    def steps(inputs: Sequence[Sequence[Tensor]], grads: Sequence[Tensor]) -> list[list[Tensor]]:
        return [step(n.forward, ts, g) for n, ts, g in zip(layers, inputs, grads, strict=True)]

    arguments = [layer.inputs for layer in layers], [layer.grad for layer in layers]
    program = offline.generate(
        make_fx(steps, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments), arguments, target
    )
    left = [name for name in program.externs if "blocksparse" in name]
    assert not left, f"operators that were not lowered: {left}"
    return program


def check(cases: Sequence[Case]) -> offline.OfflineProgram:
    """Errors are at most twice those of torch's own dense layer, plus a rounding of the result."""
    torch.manual_seed(0)
    layers = [Layer(case) for case in cases]
    program = generate(layers)
    results = program.run([layer.inputs for layer in layers], [layer.grad for layer in layers])
    for layer, result in zip(layers, results, strict=True):
        exact = step(layer.reference, [t.double() for t in layer.inputs], layer.grad.double())
        dense = step(layer.reference, layer.inputs, layer.grad)
        for name, got, want, other in zip(("y", "x", "tiles", "bias"), result, exact, dense, strict=True):
            assert (got.shape, got.dtype) == (want.shape, layer.case.dtype), (layer.case, name)
            limit = 2 * (other - want).norm() + torch.finfo(layer.case.dtype).eps / 2 * want.norm()
            assert (got - want).norm() <= limit, (layer.case, name, (got - want).norm(), limit)
    return program


def gradients(program: offline.OfflineProgram) -> list[offline.TritonKernel]:
    """The kernels for gradients of tiles."""
    return [kernel for kernel in program.templates if "GROUPS" in kernel.source]


CASES = [
    Case((2, 32, 7, 6), 48, (3, 3), padding=1),
    Case((2, 64, 5, 5), 64, (1, 1), (32, 32)),
    Case((2, 32, 9, 8), 32, (3, 3), (32, 16), stride=2, padding=1),
    Case((1, 32, 9, 9), 32, (1, 1), stride=2),
    Case((2, 64, 8, 8), 64, (3, 3), (64, 64), padding=2, dilation=2, density=0.3),
    Case((1, 64, 6, 6), 64, (3, 3), (32, 32), padding=1, groups=2),
    Case((2, 40, 5, 6), 50, (3, 3), padding=1),  # channels that blocks do not divide
    Case((2, 3, 64), 48),
    Case((70, 100), 50, (), (32, 32)),
    Case((2, 32, 19), 32, (5,), stride=2, padding=2),
    Case((1, 16, 5, 4, 5), 32, (3, 3, 3), stride=2, padding=1),
    Case((1, 32, 4, 4), 32, (3, 3), padding=1, density=0.0),
]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)
def test_gradients_match_float64(dtype):
    check([replace(case, dtype=dtype) for case in CASES])


def test_many_pixels_are_shared_by_several_programs():
    program = check([Case((1, 16, 40, 40), 32, (3, 3), padding=1), Case((1600, 48), 32)])
    parts = [re.search(r"SPLIT : tl.constexpr = (\d+)", kernel.source) for kernel in gradients(program)]
    assert [part and int(part[1]) for part in parts] == [3, 3]


LAYERS = [
    Case((8, 256, 28, 28), 256, (3, 3), (64, 64), padding=1, pixels=128),
    Case((8, 256, 28, 28), 256, (3, 3), (32, 32), padding=1, pixels=128, dtype=HALF),
    Case((8, 128, 28, 28), 128, (3, 3), (16, 16), padding=1, stride=2, pixels=128),
    Case((8, 256, 28, 28), 512, (1, 1), (128, 64), pixels=64),
    Case((8, 256, 28, 28), 256, (3, 3), (64, 64), padding=1, pixels=64, dtype=FLOAT),
    Case((2048, 1024), 1024, (), (32, 32), pixels=128),
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiles_without_spills_to_matrix_instructions(target):
    with tf32():
        program = generate([Layer(case) for case in LAYERS], target)
        kernels = gradients(program)
    assert len(kernels) == len(LAYERS)
    for kernel in kernels:
        found = kernel.compile().resources
        assert found.spill_bytes == 0, (kernel.name, found)
        assert found.tensor_core, (kernel.name, found)
        assert (
            target != "sm_90" or found.tensor_core == "wgmma" or "BH : tl.constexpr = 64" not in kernel.source
        )


# ---- whole networks ----------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 40, 1), nn.ReLU(), nn.Flatten(), nn.Linear(40 * 16, 10),
    )  # fmt: skip
    return bsc.apply_pattern(model, bsc.RandomBlocks((16, 16), 0.5), include=["2", "4"])


@pytest.fixture
def planned_for_h200(monkeypatch):
    """The backend's training path as on a GPU; without Inductor, graphs run on the operators' references."""
    spec = devices.device("h200")
    for name in ("choose_training", "lower_training"):
        monkeypatch.setattr(training_graph, name, partial(getattr(training_graph, name), device=spec))
    monkeypatch.setattr(training_graph.TrainingGraph, "_inductor", lambda self, gm, inputs: gm)
    torch._dynamo.reset()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_a_network_trains_on_gpu_kernels(planned_for_h200, autocast, folded):
    model = bsc.fold_zero_blocks(network()) if folded else network()
    fast = torch.compile(model, backend="blocksparse", options={"dense": "never"}, fullgraph=True)
    x, gradients = torch.randn(4, 3, 8, 8), []
    for run in (model, fast):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(x)
        out.float().square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, want in gradients[0].items():
        assert (gradients[1][name] - want).norm() <= (3e-2 if autocast else 1e-5) * want.norm(), name
    plan = compiled_graphs()[-1].plan
    assert [d.kernel for d in plan] == ["dense", "triton_gather", "triton_gather", "dense"]
    assert {d.site.dtype for d in plan} == {"bfloat16" if autocast else "float32"}


def test_the_plan_for_a_gpu_says_what_trains_there():
    plan = bsc.explain(network(), torch.randn(4096, 3, 8, 8), device="h200", training=True).plan
    assert plan.device == "h200"
    assert "no fixed zero blocks" in plan["0"].reason
    assert "forward and backward" in plan["2"].reason
