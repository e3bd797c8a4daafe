"""The whole compile pipeline: one list of named passes, run in order."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule

from ..devices import AnyDevice
from ..devices import device as present_device
from ..layer_chain import chain_of
from ..layouts import CHANNELS_LAST, Layouts
from ..pattern import BlockShape
from ..plan import Plan
from ..pointwise_depthwise import is_fused
from .choose_chains import choose_chains
from .choose_kernels import choose_kernels
from .choose_layouts import choose_layouts
from .fold_batch_norm import fold_batch_norm
from .fold_constants import fold_constants
from .fold_pads import fold_pads
from .fuse_chains import fuse_chains
from .fuse_depthwise import choose_fusions, fuse_depthwise
from .lower_quantized import lower_quantized
from .lower_sites import lower_sites
from .permute_channels import permute_channels

log = logging.getLogger("blocksparse_compiler")


@dataclass
class PassContext:
    """What passes read, and the plan they make.

    `on_pass` is called after each pass with its name, the graph and its match count (for dumps).
    """

    device: AnyDevice | None = None
    block_shape: BlockShape | None = None
    allow_dense: bool = True
    given_plan: Plan | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    tune: Callable[[GraphModule, Plan], Plan] | None = None
    spec_of: Callable[[str], AnyDevice] = field(default_factory=lambda: functools.cache(present_device))
    plan: Plan = field(default_factory=Plan)
    on_pass: Callable[[str, GraphModule, int], None] | None = None


def _choose(gm: GraphModule, context: PassContext) -> int:
    context.plan = choose_kernels(
        gm,
        context.device,
        block_shape=context.block_shape,
        allow_dense=context.allow_dense,
        plan=context.given_plan,
        inductor=context.inductor,
        spec_of=context.spec_of,
    )
    if context.tune is not None and context.given_plan is None:
        context.plan = context.tune(gm, context.plan)
    return sum(not decision.is_dense for decision in context.plan)


def _choose_chains(gm: GraphModule, context: PassContext) -> int:
    if context.given_plan is None:
        context.plan = choose_chains(gm, context.plan, context.device, spec_of=context.spec_of)
    return len({chain_of(decision.config) for decision in context.plan} - {None})


def _choose_layouts(gm: GraphModule, context: PassContext) -> int:
    if context.given_plan is None:  # whose layouts are obeyed
        context.plan = choose_layouts(gm, context.plan, context.device, spec_of=context.spec_of)
    return sum(Layouts.of(decision.config) != CHANNELS_LAST for decision in context.plan)


def _choose_fusions(gm: GraphModule, context: PassContext) -> int:
    if context.given_plan is None:
        context.plan = choose_fusions(gm, context.plan)
    return sum(is_fused(decision.config) for decision in context.plan) // 2


PIPELINE: tuple[tuple[str, Callable[[GraphModule, PassContext], int]], ...] = (
    ("fold_constants", lambda gm, _: fold_constants(gm)),
    ("fold_pads", lambda gm, _: fold_pads(gm)),
    ("fold_batch_norm", lambda gm, _: fold_batch_norm(gm)),
    ("permute_channels", lambda gm, _: permute_channels(gm)),
    ("choose_kernels", _choose),
    ("choose_chains", _choose_chains),
    ("choose_layouts", _choose_layouts),
    ("choose_fusions", _choose_fusions),
    ("lower_quantized", lambda gm, context: lower_quantized(gm, context.plan)),
    ("lower_sites", lambda gm, context: lower_sites(gm, context.plan)),
    ("fuse_chains", lambda gm, _: fuse_chains(gm)),
    ("fuse_depthwise", lambda gm, _: fuse_depthwise(gm)),
)


def run_pipeline(gm: GraphModule, context: PassContext) -> Plan:
    """Runs every pass on `gm` in place; returns the plan that was carried out."""
    for name, run in PIPELINE:
        start = time.perf_counter()
        count = run(gm, context)
        gm.graph.lint()
        log.info(
            "%s: %s (%.3f s)", name, f"{count} sites" if count else "unchanged", time.perf_counter() - start
        )
        if context.on_pass:
            context.on_pass(name, gm, count)
    return context.plan
