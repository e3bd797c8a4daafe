"""Zeros in front of convolutions, taken into them."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import compiling
from torch import Tensor, nn
from torch.nn.functional import pad

import blocksparse_compiler as bsc
from blocksparse_compiler import trace
from blocksparse_compiler.backend import compiled_graphs
from blocksparse_compiler.passes import fold_pads, run_pipeline
from blocksparse_compiler.passes.calls import op_name
from blocksparse_compiler.passes.pipeline import PassContext
from blocksparse_compiler.planning import copy_graph

OP = torch.ops.blocksparse.padded_conv2d.default


class Padded(nn.Module):
    """`pads` in front of a convolution."""

    def __init__(
        self, pads: tuple[int, ...], *, value: float = 0.0, mode: str = "constant", **kwargs
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 12, 3, **kwargs)
        self.pads, self.value, self.mode = pads, value, mode

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return self.conv(pad(x, self.pads, self.mode, self.value if self.mode == "constant" else None))


def folded(model: nn.Module, x: Tensor) -> tuple[torch.fx.GraphModule, int]:
    gm = copy_graph(trace(model.eval(), x))
    return gm, fold_pads(gm)


def run(gm: torch.fx.GraphModule, x: Tensor) -> Tensor:
    out = gm(x)
    return out[0] if isinstance(out, tuple) else out


def pads(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if op_name(node) in ("pad", "constant_pad_nd")]


@pytest.mark.parametrize("border", [(1, 1, 1, 1), (0, 1, 0, 1), (2, 0), (3, 1, 0, 2), (0, 0, 0, 0)])
@pytest.mark.parametrize("kwargs", [{}, {"stride": 2}, {"padding": 1, "groups": 4, "bias": False}], ids=str)
def test_folded_layers_compute_the_same(border, kwargs):
    model, x = Padded(border, **kwargs), torch.randn(2, 8, 9, 10)
    gm, count = folded(model, x)
    assert count == 1 and len(gm.graph.find_nodes(op="call_function", target=OP)) == 1
    assert not pads(gm)
    torch.testing.assert_close(run(gm, x), model(x))


@pytest.mark.parametrize(
    "model",
    [
        Padded((1, 1, 1, 1), value=1.0),
        Padded((1, 1, 1, 1), mode="reflect"),
        Padded((-1, 1, 1, 1)),
        Padded((0, 0, 0, 0, 1, 0)),
    ],
    ids=["ones", "reflected", "cut", "channels"],
)
def test_other_borders_stay(model):
    channels = 7 if len(model.pads) == 6 else 8
    _, count = folded(model, torch.randn(2, channels, 9, 9))
    assert count == 0


def test_a_tensor_that_is_written_to_in_between_stays():
    class Written(Padded):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(x)
            padded = pad(x, self.pads)
            x.add_(1)
            return self.conv(padded) + x.sum()

    _, count = folded(Written((1, 1, 1, 1)), torch.randn(1, 8, 6, 6))
    assert count == 0


def test_other_readers_keep_the_padded_tensor():
    class Two(Padded):
        def forward(self, x: Tensor) -> Tensor:
            padded = pad(x, self.pads)
            return self.conv(padded).mean() + padded.sum()

    model, x = Two((0, 1, 0, 1)), torch.randn(1, 8, 6, 6)
    gm, count = folded(model, x)
    assert count == 1 and len(pads(gm)) == 1
    torch.testing.assert_close(run(gm, x), model(x))


def test_networks_from_tensorflow_run_in_chains():
    """Their depthwise layers are padded outside, more on one side where they are strided."""
    from chain_models import DEAR_CALLS
    from transformers import MobileNetV2Config, MobileNetV2Model

    torch.manual_seed(0)
    model = MobileNetV2Model(MobileNetV2Config(tf_padding=True, depth_multiplier=0.35, image_size=64)).eval()
    points = [
        name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)
    ]
    bsc.prune_blocks(model, (4, 1), 0.2, include=points)
    x = torch.randn(1, 3, 64, 64)
    gm = copy_graph(trace(model, x))
    run_pipeline(gm, PassContext(device=DEAR_CALLS))
    chains = gm.graph.find_nodes(op="call_function", target=torch.ops.blocksparse.layer_chain.default)
    assert len(chains) == 1
    layers = chains[0].args[6].split("|")
    assert sum(layer.startswith("depthwise") for layer in layers) >= 16
    want = model.double()(x.double()).last_hidden_state
    out = gm(x)[0]
    assert (out - want).norm() < 1e-5 * want.norm()


def test_dense_layers_are_compiled():
    model, x = Padded((0, 1, 0, 1), stride=2).eval(), torch.randn(1, 8, 10, 10)
    with compiling(), torch.no_grad():
        fast = torch.compile(model, backend="blocksparse", fullgraph=True)
        torch.testing.assert_close(fast(x), model(x))
    assert all(d.is_dense for d in compiled_graphs()[-1].plan)
    assert compiled_graphs()[-1].plan.decisions[0].site.padding == ((0, 1), (0, 1))
