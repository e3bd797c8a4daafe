"""Which nodes Inductor is to leave channels first: those between kernels that write and read so."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from blocksparse_compiler.codegen.channels_first import channels_first_nodes
from blocksparse_compiler.kernel_variant import KernelConfig
from blocksparse_compiler.layouts import Layouts

aten, ops = torch.ops.aten, torch.ops.blocksparse


class Builder:
    """A graph of calls, without operands that do not matter."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")

    def kernel(self, x: fx.Node, reads: bool, writes: bool) -> fx.Node:
        text = KernelConfig("cpu_f32_spmm", Layouts(reads, writes).parameters).encode()
        return self.graph.call_function(ops.conv.default, (x, text))

    def relu(self, x: fx.Node) -> fx.Node:
        return self.graph.call_function(aten.relu.default, (x,))

    def add(self, x: fx.Node, y: fx.Node) -> fx.Node:
        return self.graph.call_function(aten.add.Tensor, (x, y))

    def dense(self, x: fx.Node) -> fx.Node:
        return self.graph.call_function(aten.convolution.default, (x,))

    def first(self, *returned: fx.Node) -> set[fx.Node]:
        self.graph.output(returned)
        return channels_first_nodes(self.graph)


def test_a_residual_region():
    b = Builder()
    stem = b.relu(b.dense(b.x))
    one = b.kernel(stem, False, True)
    two = b.kernel(one, True, True)
    total = b.add(one, two)
    three = b.kernel(total, True, False)
    last = b.relu(three)
    assert b.first(last) == {one, two, total}


def test_graphs_without_a_region_are_left_alone():
    b = Builder()
    assert b.first(b.relu(b.kernel(b.relu(b.dense(b.x)), False, False))) == set()


@pytest.mark.parametrize("reads", [False, True])
def test_where_writers_differ_readers_decide(reads):
    b = Builder()
    one, two = b.kernel(b.x, False, True), b.dense(b.x)
    total = b.add(one, two)
    kernel = b.kernel(total, reads, False)
    assert b.first(kernel) == ({one, total} if reads else {one})


def test_behind_a_region_its_layout_stays_until_the_next_kernel():
    b = Builder()
    one = b.kernel(b.x, False, True)
    between = b.relu(one)
    dense = b.dense(between)
    behind = b.relu(dense)
    assert b.first(behind) == {one, between}


def test_inputs_lie_as_they_are_read():
    b = Builder()
    before = b.relu(b.x)
    one = b.kernel(before, True, False)
    assert b.first(one) == {b.x, before}
