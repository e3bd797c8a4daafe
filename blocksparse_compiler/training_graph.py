"""Training graphs: layers whose zeros are fixed run all three products of a step on kept tiles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .backend import CompiledGraph
from .codegen import inductor_api, lowerings
from .codegen.lowerings import source_digest
from .dump import GraphDump
from .options import BackendOptions
from .passes.calls import tensor_meta
from .passes.choose_training import choose_training
from .passes.find_sites import sites_with_calls
from .passes.fixed_weights import FixedWeights
from .passes.lower_training import lower_training
from .plan import Plan
from .planning import copy_graph
from .progress import ProgressLine

log = logging.getLogger("blocksparse_compiler")


def compile_training(
    gm: GraphModule, example_inputs: Sequence[Any], options: BackendOptions, config: dict[str, Any]
) -> Callable[..., Any]:
    """`gm` with its backward pass: block-sparse where zeros are fixed, on dense kernels elsewhere."""
    graph = TrainingGraph(gm, example_inputs, options, config)
    sparse = sum(not decision.is_dense for decision in graph.plan)
    if sparse:
        log.info("compiled for training: %d of %d layers block-sparse", sparse, len(graph.plan))
    else:
        log.warning(
            "gradients are enabled: compiled for training, on Inductor's dense kernels. "
            "For inference call the compiled model under torch.no_grad() or torch.inference_mode()."
        )
    for decision in graph.plan:
        log.info("%s: %s", decision.site.name, decision.reason)
    return graph


class TrainingGraph(CompiledGraph):
    """A graph compiled for training, and again when a mask, frozen scale or index of a weight changes.

    Trained tensors stay inputs; only what their weights are masked, scaled or scattered with is frozen.
    """

    def _unfreezable(self, gm: GraphModule) -> set[Node]:
        frozen = {n for n in _behind_weights(gm) if (t := tensor_meta(n)) is not None and not t.requires_grad}
        return super()._unfreezable(gm) | {n for n in gm.graph.nodes if n not in frozen}

    def _grad_mode(self) -> AbstractContextManager[Any]:
        return torch.enable_grad()

    def _lower(self, gm: GraphModule, dump: GraphDump, line: ProgressLine) -> tuple[GraphModule, Plan]:
        options, work = self._options, copy_graph(gm)
        try:
            lowerings.register()
            weights = FixedWeights(work, _trained(work))
            plan = choose_training(
                work,
                weights,
                block_shape=options.block_shape,
                allow_dense=options.dense == "auto",
                plan=options.plan,
            )
            count = lower_training(work, plan, weights)
            work.graph.lint()
        except Exception:
            log.exception("the block-sparse passes failed; this graph trains dense")
            return gm, Plan()
        dump.on_pass("lower_training", work, count)
        dump.plan(plan)
        return work, plan

    def _inductor(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        sparse = [decision for decision in self.plan if not decision.is_dense]
        config = dict(self._config)
        if sparse:
            # As in inference, Inductor would not see that channels-last pays, and its caches not our sources.
            config["force_layout_optimization"] = any(d.site.kernel_size for d in sparse)
            config["post_grad_custom_post_pass"] = inductor_api.cache_key_pass(source_digest(), self._config)
        return inductor_api.compile_fx(copy_graph(gm), inputs, config)


def _behind_weights(gm: GraphModule) -> set[Node]:
    """The inputs that the weights of convolutions and linear layers are made of."""
    pending = [call.weight for call, _ in sites_with_calls(gm)]
    seen = set(pending)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                pending.append(node)
    return {node for node in seen if node.op == "placeholder"}


def _trained(gm: GraphModule) -> dict[Node, Tensor]:
    """The inputs that hold numbers, with shapes that are known."""
    found = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = tensor_meta(node)
        if value is not None and value.is_floating_point() and all(isinstance(n, int) for n in value.shape):
            found[node] = value
    return found
