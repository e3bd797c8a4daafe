"""Networks of layers that run in chains, plans for them, and a way to do without chains."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from layer_cases import FIXED
from torch import Tensor, nn

import blocksparse_compiler as bsc
from blocksparse_compiler import Plan, trace
from blocksparse_compiler.layer_chain import Chain, chain_of
from blocksparse_compiler.passes.pipeline import PassContext, run_pipeline
from blocksparse_compiler.planning import copy_graph

# The function of this name hides its module.
CHOOSE = importlib.import_module("blocksparse_compiler.passes.choose_chains")

DEAR_CALLS = dataclasses.replace(
    FIXED, sparse_call_seconds=1e-3, dense_conv_call_seconds=2e-3, dense_linear_call_seconds=2e-3
)
"""A CPU on which few kernels are better than many: whatever can run in a chain does."""


@pytest.fixture
def no_chains(monkeypatch):
    """Plans as if no layers could share one kernel in a chain."""
    monkeypatch.setattr(CHOOSE, "paths", lambda *_: iter(()))


def point(inputs: int, outputs: int, kept: float = 0.2, height: int = 1, **kwargs) -> nn.Module:
    return bsc.prune_blocks(nn.Conv2d(inputs, outputs, 1, **kwargs), (height, 1), kept)


def deep(channels: int, stride: int = 1, size: int = 3, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, stride, size // 2, groups=channels, **kwargs)


class Block(nn.Module):
    """An inverted residual; `before`: an activation of what is added, `after`: one of the sum."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        hidden: int,
        stride: int = 1,
        activation: nn.Module | None = None,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        inner = activation or nn.ReLU6()
        steps = [point(channels, hidden), inner, deep(hidden, stride, bias=False), inner]
        self.body = nn.Sequential(*steps, point(hidden, outputs, bias=False))
        self.before, self.after = before or nn.Identity(), after or nn.Identity()
        self.skips = stride == 1 and channels == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(self.body(x))
        return self.after(x + y if self.skips else y)


def residuals(**kwargs) -> nn.Module:
    """Two blocks that add what they read, one that does not."""
    torch.manual_seed(0)
    blocks = [Block(32, 32, 64, **kwargs), Block(32, 32, 64, **kwargs), Block(32, 48, 64, 2, **kwargs)]
    return nn.Sequential(*blocks).eval()


def separable() -> nn.Module:
    """As in MobileNet-v1: a depthwise layer first, and no sums."""
    torch.manual_seed(0)
    steps = [deep(32), nn.ReLU(), point(32, 48, height=4), nn.ReLU(), deep(48, 2), nn.ReLU(), point(48, 64)]
    return nn.Sequential(*steps, nn.ReLU()).eval()


def lowered(
    model: nn.Module, *inputs: Tensor, device=DEAR_CALLS, plan: Plan | None = None
) -> tuple[torch.fx.GraphModule, Plan]:
    gm = copy_graph(trace(model, *inputs))
    made = run_pipeline(gm, PassContext(device=device, given_plan=plan))
    return gm, made


def chains(gm: torch.fx.GraphModule) -> list[Chain]:
    """Of the kernels in a graph."""
    nodes = gm.graph.find_nodes(op="call_function", target=torch.ops.blocksparse.layer_chain.default)
    return [Chain.decode(str(node.args[6])) for node in nodes]


def planned(plan: Plan) -> list[list[str]]:
    """Names of the layers of each chain."""
    found: dict[int, list[str]] = defaultdict(list)
    for decision in plan:
        number = chain_of(decision.config)
        if number is not None:
            found[number].append(decision.site.name)
    return list(found.values())


def check(gm: torch.fx.GraphModule, model: nn.Module, *inputs: Tensor) -> None:
    """The graph against plain torch, in float64."""
    found = gm(*(x.clone() for x in inputs))
    with torch.no_grad():
        want = copy.deepcopy(model).double()(*(x.double() for x in inputs))
    pairs = zip(_tensors(found), _tensors(want), strict=True)
    for out, exact in pairs:
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


def _tensors(value: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
