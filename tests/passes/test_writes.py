"""What a graph writes to is no constant: directly, through views, by flags and inside other graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blocksparse_compiler.passes.writes import returned_nodes, written_nodes


def captured(function, *args):
    graphs = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True)(*args)
    return graphs[0]


def written_inputs(function, *args):
    gm = captured(function, *args)
    return names(gm, written_nodes(gm))


def names(gm, nodes):
    """The inputs among `nodes`, by the names that Dynamo gives arguments."""
    return {n.name.strip("l_") for n in gm.graph.find_nodes(op="placeholder") if n in nodes}


def _cond(a, b):
    return torch.cond(b.sum() > 0, lambda u, v: u + v, lambda u, v: u - v, (a, b))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b: a.add(b), set()),
        (lambda a, b: a.add_(b), {"a"}),
        (lambda a, b: a[:2].t().mul_(2) + b[:2].t(), {"a"}),
        (lambda a, b: F.relu(a * 1, inplace=True) + b, set()),
        (lambda a, b: F.relu(a.view(-1), inplace=True) + b.view(-1), {"a"}),
        (lambda a, b: F.hardtanh(b, -1.0, 1.0, True) + a, {"b"}),
        (lambda a, b: torch.mul(a, 2, out=b), {"b"}),
        (lambda a, b: torch._foreach_mul_([a, b], 2), {"a", "b"}),
        (lambda a, b: F.batch_norm(a, b[0], b[1], training=True), {"b"}),
        (lambda a, b: F.batch_norm(a, b[0], b[1]), set()),
        (lambda a, b: F.instance_norm(a[None].mT, b[0], b[1]), {"b"}),
        (lambda a, b: F.embedding(a[0].long(), b, max_norm=1.0), {"b"}),
        (lambda a, b: F.embedding(a[0].long(), b), set()),
        (_cond, set()),
    ],
)
def test_written_inputs(function, expected):
    assert written_inputs(function, torch.rand(4, 4), torch.rand(4, 4)) == expected


def test_custom_operators_say_what_they_write():
    @torch.library.custom_op("blocksparse_test::increment", mutates_args={"b"})
    def increment(a: torch.Tensor, b: torch.Tensor) -> None:
        b.add_(a)

    assert written_inputs(lambda a, b: increment(a, b), torch.rand(4), torch.rand(4)) == {"b"}


def test_returned_views_of_inputs():
    gm = captured(lambda a, b: (a + 1, b.t()), torch.rand(4, 4), torch.rand(4, 4))
    assert names(gm, returned_nodes(gm)) == {"b"}


def test_exported_graphs_write_their_buffers_at_the_end():
    import blocksparse_compiler as bsc
    from blocksparse_compiler.passes.static_values import StaticValues

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.ones(4, 4))
            self.register_buffer("v", torch.ones(4, 4))

        def forward(self, x):
            self.w.add_(1)
            return F.linear(x, self.w) + F.linear(x, self.v)

    gm = bsc.trace(Counting(), torch.rand(2, 4))
    values = StaticValues(gm)
    static = {n.target: values.is_static(n) for n in gm.graph.find_nodes(op="get_attr")}
    assert static == {"w": False, "v": True}
