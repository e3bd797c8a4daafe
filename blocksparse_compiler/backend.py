"""`torch.compile(model, backend="blocksparse")`."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .codegen import inductor_api, lowerings
from .codegen.lowerings import source_digest
from .dump import GraphDump
from .errors import BlockSparseError
from .options import BackendOptions
from .passes.lower_sites import remove_unused_constants
from .passes.pipeline import PassContext, run_pipeline
from .passes.writes import returned_nodes, written_nodes
from .plan import Plan
from .planning import copy_graph
from .progress import ProgressLine, progress_line
from .weight_guard import WeightGuard

log = logging.getLogger("blocksparse_compiler")

MAX_RECOMPILES = 8
"""Per set of weights that is in use."""
MAX_VERSIONS = 64
_alive: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
_serial = itertools.count()


def blocksparse(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """The Dynamo backend: finds zero blocks in conv and linear weights and compiles them away.

    Without gradients, weights are frozen into the kernels, and watched: a change recompiles. With
    gradients, layers whose zeros are fixed (by masks, frozen scales, folding) train on their kept tiles, and
    everything else goes to Inductor as it is.

    Args:
        mode: as for Inductor (`"default"`, `"reduce-overhead"`, `"max-autotune"` …).
        options: see `BackendOptions`; anything else is passed to Inductor.

    Raises:
        OptionError: for an unknown option or value.
        BlockSparseError: for a given plan that does not fit, or weights that are not finite.
    """
    parsed = BackendOptions.parse(options)
    config = {**inductor_api.mode_options(mode), **parsed.inductor}
    if _needs_gradients(example_inputs):
        from .training_graph import compile_training  # which builds on this module

        return compile_training(gm, example_inputs, parsed, config)
    return CompiledGraph(gm, example_inputs, parsed, config)


def compiled_graphs() -> list[CompiledGraph]:
    """The graphs alive in this process, oldest first; each has the `plan` it carries out."""
    return sorted(_alive, key=lambda graph: graph.serial)


class _Version(NamedTuple):
    """A graph compiled for one set of weights."""

    run: Callable[..., Any]
    guard: WeightGuard


class CompiledGraph:
    """One frozen inference graph, compiled for each set of weights it meets, and again when one changes.

    `plan` is that of the latest compilation.
    """

    def __init__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        options: BackendOptions,
        config: dict[str, Any],
    ) -> None:
        self.plan = Plan()
        self._options, self._config = options, config
        self._original = copy_graph(gm)
        self._fake_mode = inductor_api.fake_mode_of(gm)
        unfrozen = self._unfreezable(gm)
        self._static: list[int] = []
        self._dynamic: list[int] = []
        for i, (node, value) in enumerate(
            zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
        ):
            # A subclass (a quantised weight, say) may be anything: Inductor deals with it.
            plain = type(value) in (Tensor, torch.nn.Parameter)
            frozen = plain and inductor_api.is_static_input(value) and node not in unfrozen
            (self._static if frozen else self._dynamic).append(i)
        self._versions: list[_Version] = []
        self._compilations = 0
        self._unfrozen: Callable[..., Any] | None = None
        self.serial = next(_serial)
        self._add_version(example_inputs, example_inputs)
        _alive.add(self)

    def _unfreezable(self, gm: GraphModule) -> set[Node]:
        """Inputs that stay inputs."""
        return written_nodes(gm) | returned_nodes(gm)

    def _grad_mode(self) -> AbstractContextManager[Any]:
        return torch.no_grad()

    def __call__(self, *args: Any) -> Any:
        if self._unfrozen is not None:
            return self._unfrozen(*args)
        statics = [args[i] for i in self._static]
        version = next((v for v in self._versions if v.guard.watches(statics)), None)
        if version is None or version.guard.changed(statics):
            return self._compile_again(args, version)(*args)
        return version.run(*[args[i] for i in self._dynamic])

    def _compile_again(self, args: Sequence[Any], outdated: _Version | None) -> Callable[..., Any]:
        self._versions = [v for v in self._versions if v is not outdated and not v.guard.orphaned]
        number = len(self._versions) + 1
        # Blocks of one class, and models of one class, share this graph: each has weights of its own.
        if number > MAX_VERSIONS or self._compilations >= number * (MAX_RECOMPILES + 1):
            log.warning(
                "weights changed %d times since compilation: this graph now runs on Inductor's dense "
                "kernels, which read weights anew on each call. Compile again once the weights are final.",
                self._compilations,
            )
            self._versions.clear()
            self._compile_unfrozen(args)
            return self
        change = "other weights are in use" if outdated is None else "a weight changed after compilation"
        log.info("%s: compiling again (%d)", change, self._compilations)
        with inductor_api.tracing(self._fake_mode):
            self._add_version(args, self._traced_inputs(args))
        return self

    def _add_version(self, args: Sequence[Any], examples: Sequence[Any]) -> None:
        self._compilations += 1
        with progress_line() as line:
            self._versions.append(self._compile_frozen(args, examples, line))

    def _compile_frozen(self, args: Sequence[Any], examples: Sequence[Any], line: ProgressLine) -> _Version:
        statics = [args[i] for i in self._static]
        gm = _freeze_inputs(copy_graph(self._original), dict(zip(self._static, statics, strict=True)))
        dump = GraphDump(self._options.dump_dir)
        line.update("planning")
        lowered, self.plan = self._lower(gm, dump, line)
        sparse = sum(not d.is_dense for d in self.plan)
        blocks = sum(d.is_block_sparse for d in self.plan)
        line.update(f"generating code ({blocks} of {len(self.plan)} layers block-sparse)")
        inputs = [examples[i] for i in self._dynamic]
        with self._grad_mode(), dump.sources():
            try:
                run = self._inductor(lowered, inputs)
            except inductor_api.RestartAnalysis:  # Dynamo traces again, with numbers for some symbols
                raise
            except Exception:
                if not sparse:
                    raise
                log.exception("generating block-sparse kernels failed; this graph stays dense")
                self.plan = Plan()
                run = self._inductor(gm, inputs)
        return _Version(run, WeightGuard(statics, self._options.guard))

    def _inductor(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        config = {
            **self._config,
            "freezing": True,
            # Inductor looks for dense convolutions to see that channels-last pays; ours hide that.
            "force_layout_optimization": any(not d.is_dense and d.site.kernel_size for d in self.plan),
            "post_grad_custom_post_pass": inductor_api.cache_key_pass(source_digest(), self._config),
        }
        try:
            return inductor_api.compile_fx(copy_graph(gm), inputs, config)
        except inductor_api.RestartAnalysis:
            raise
        except Exception as error:
            # Inductor cannot freeze some layers, float64 convolutions for one.
            log.info("Inductor failed with frozen weights, trying without: %s", error)
            return inductor_api.compile_fx(copy_graph(gm), inputs, {**config, "freezing": False})

    def _lower(self, gm: GraphModule, dump: GraphDump, line: ProgressLine) -> tuple[GraphModule, Plan]:
        """Our passes on `gm`; the graph as it was, if they fail for a reason that is not the user's."""
        options = self._options
        allow_dense = options.dense == "auto"

        def tune(graph: GraphModule, plan: Plan) -> Plan:
            from .tune import tune_plan

            shape = options.block_shape
            return tune_plan(graph, plan, block_shape=shape, allow_dense=allow_dense, progress=on_layer)

        def on_layer(name: str, done: int, total: int) -> None:
            line.update(f"measuring {name}", done, total)

        context = PassContext(
            block_shape=options.block_shape,
            allow_dense=allow_dense,
            given_plan=options.plan,
            inductor=self._config,
            tune=tune if options.autotune else None,
            on_pass=dump.on_pass,
        )
        work = copy_graph(gm)
        try:
            lowerings.register()
            plan = run_pipeline(work, context)
        except BlockSparseError:
            raise
        except Exception:
            log.exception("the block-sparse passes failed; this graph stays dense")
            return gm, Plan()
        dump.plan(plan)
        return work, plan

    def _compile_unfrozen(self, args: Sequence[Any]) -> None:
        with inductor_api.tracing(self._fake_mode), self._grad_mode():
            inputs = self._traced_inputs(args)
            self._unfrozen = inductor_api.compile_fx(copy_graph(self._original), inputs, self._config)

    def _traced_inputs(self, args: Sequence[Any]) -> list[Any]:
        """The fake tensors and symbols that Dynamo traced with: after its trace, values mean static sizes."""
        nodes = self._original.graph.find_nodes(op="placeholder")
        return [node.meta.get("example_value", value) for node, value in zip(nodes, args, strict=True)]


def _needs_gradients(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)


def _freeze_inputs(gm: GraphModule, values: dict[int, Tensor]) -> GraphModule:
    """Turns the placeholders at these positions into buffers."""
    for i, node in enumerate(list(gm.graph.find_nodes(op="placeholder"))):
        if i not in values:
            continue
        name = f"_frozen_{i}"
        gm.register_buffer(name, values[i].detach(), persistent=False)
        with gm.graph.inserting_before(node):
            attribute = gm.graph.get_attr(name)
        attribute.meta = {k: v for k, v in node.meta.items() if k == "example_value"}
        node.replace_all_uses_with(attribute)
        gm.graph.erase_node(node)
    remove_unused_constants(gm)
    gm.recompile()
    return gm
