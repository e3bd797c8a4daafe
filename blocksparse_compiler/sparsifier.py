"""`BlockSparsifier`: schedule and state of a block-sparse training, for any PyTorch loop."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ranks
from .budget import Budget, Masks, check_reachable, choose_blocks, latency_budget, weight_budget
from .devices import AnyDevice
from .devices import device as find_device
from .errors import LayerError, OptionError, PatternError, check_number
from .gates import local_part
from .passes.fold_zero_blocks import fold_zero_blocks
from .passes.insert_block_scales import plan_gates, register_gates
from .pattern import BlockShape
from .report import sparsity_report
from .scales import BlockScale, soft_threshold
from .schedule import SparsitySchedule
from .selection import Filter
from .sparse_layer import layers_by_gate
from .sparsifier_options import NAME, SparsifierOptions

log = logging.getLogger(__name__)


class BlockSparsifier:
    """Trains a model to block sparsity: owns the gates on its weights, the schedule and the state.

        sparsifier = BlockSparsifier(model, (32, 32), target_density=0.5, schedule=SparsitySchedule(...))
        optimizer = torch.optim.SGD(sparsifier.param_groups(weight_decay=1e-4), lr, momentum=0.9)
        for x, y in loader:
            loss_of(model(x), y).backward()
            optimizer.step(); optimizer.zero_grad()
            sparsifier.step(lr)
        sparsifier.fold()

    Two ways to say how sparse. `gamma` is DBSR: the penalty `γ Σ|S|` on trainable block scales, by its
    proximal step, finds the density by itself. `target_density` is exact: at every selection, the blocks
    that are worth most for their cost are kept, as many as the budget holds (less than one block of it is
    left over).

    Construct it on the plain model, then wrap that in DDP or `fully_shard`, then make the optimizer.

    Args:
        model: changed in place; layers that cannot be pruned in such blocks stay dense, with a logged reason.
        block_shape: (output, input) channels of a block, which spans all taps.
        gamma: strength of the penalty, at least 0.
        target_density: in (0, 1], kept share of the cost that the selected layers have when dense.
        budget: the cost: `"parameters"` (weights), `"macs"` (for `example_inputs`), or `"latency"` (seconds
            that the cost model predicts for the layers on `device`, for `example_inputs`).
        scope: whether layers compete for the budget (`"global"`) or each has its own (`"layer"`).
        device: a device spec, its name or a torch device to plan for; by default the one the model is on.
        example_inputs: a tuple of positional inputs for `model`.
        importance: how blocks are valued under `target_density`: `"scales"` (DBSR's, pruned blocks can come
            back), `"magnitude"`, or `"attention"` (softmax over block logits).
        per_tap: prune each tap of a block by itself (magnitude only); with 1x1 blocks, single weights.
        schedule: when the pressure sets in, and when the structure is frozen.
        include, exclude: names (with wildcards; a name also stands for what is below it) or module types.
        synchronize: with torch.distributed initialised, compare the masks of all ranks at each selection and
            at the freeze.

    Attributes:
        steps: how often `step` was called.
        frozen: whether the structure is fixed.
        layers: the weights it works on.

    Raises:
        OptionError: on a bad option, or a target that one block in each layer already exceeds.
        PatternError, LayerError: if no layer, or not one named in `include`, can be pruned in such blocks.
            Nothing is changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        block_shape: BlockShape = (32, 32),
        *,
        gamma: float | None = None,
        target_density: float | None = None,
        budget: Literal["parameters", "macs", "latency"] = "parameters",
        scope: Literal["global", "layer"] = "global",
        device: str | torch.device | AnyDevice | None = None,
        example_inputs: tuple[Any, ...] | None = None,
        importance: str = "scales",
        per_tap: bool = False,
        schedule: SparsitySchedule | None = None,
        include: Filter = None,
        exclude: Filter = None,
        synchronize: bool = True,
    ) -> None:
        self.options = SparsifierOptions(
            block_shape,
            gamma,
            target_density,
            budget,
            scope,
            importance,
            per_tap,
            schedule or SparsitySchedule(),
        )
        self.model, self.synchronize = model, synchronize
        self.steps, self.frozen, self._folded = 0, False, False
        self._held: list[tuple[Tensor, Tensor]] = []
        planned = plan_gates(model, self.options.block_shape, self.options.gate_type, NAME, include, exclude)
        if per_tap:
            for _, gate in planned:
                gate.tell_taps_apart()  # type: ignore[operator]
        self.layers = layers_by_gate(planned, self.options.block_shape)
        self._budget = self._make_budget(device, example_inputs)
        everything = [torch.ones_like(layer.gate.kept) for layer in self.layers]
        self._dense_cost = self._budget.total(everything)
        if target_density is not None and scope == "global":
            scores = [mask.double() for mask in everything]
            check_reachable(self._budget, scores, self._target(1.0), self._dense_cost, target_density)
        register_gates(planned)

    # ---- in the training loop ------------------------------------------------------------------

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """Call it after each `optimizer.step()`.

        Args:
            lr: the learning rate of that step; needed with `gamma`. If the loss contains `penalty()`, pass 0.

        Raises:
            OptionError: if `lr` is missing or negative.
            LayerError: after `fold`, or if the ranks of a distributed training do not agree.
        """
        if self._folded:
            fix = "Train the folded model with a new optimizer and no sparsifier."
            raise LayerError(f"{NAME}.step", "a model that is not folded", "a folded one", fix)
        schedule, gamma = self.options.schedule, self.options.gamma
        if gamma is not None:
            fix = "Pass the learning rate of this step: sparsifier.step(lr)."
            check_number(f"{NAME}.step", "lr", lr, fix=fix)
        self.steps += 1
        if self.frozen:
            for parameter, value in self._held:  # momentum may have moved them
                parameter.copy_(value)
            return
        pressure, last = schedule.pressure(self.steps), self.steps == schedule.freeze
        if gamma is not None:
            assert lr is not None
            for layer in self.layers:
                assert isinstance(layer.gate, BlockScale)
                soft_threshold(layer.gate, lr * gamma * pressure)
        elif last or self.steps % schedule.every == 0:
            self._select(pressure)
        if last:
            self.freeze()

    def penalty(self) -> Tensor:
        """`γ(t) Σ|S|`, a differentiable 0-dim tensor to add to the loss instead of `step`'s proximal step.

        Zero without `gamma`, and once frozen.
        """
        gamma = self.options.gamma or 0.0
        factor = 0.0 if self.frozen else gamma * self.options.schedule.pressure(self.steps + 1)
        gates = [layer.gate for layer in self.layers if isinstance(layer.gate, BlockScale)]
        if not factor or not gates:
            return next(self.model.parameters()).new_zeros(())
        device = gates[0].scale.device
        return factor * torch.stack([g.scale.abs().sum().float().to(device) for g in gates]).sum()

    def param_groups(self, weight_decay: float, **gate_options: Any) -> list[dict[str, Any]]:
        """Optimizer groups: `weight_decay` on everything but the gates' own parameters (scales, logits).

        Args:
            gate_options: further options of the gates' group, such as a learning rate of its own (`lr=...`).

        Raises:
            OptionError: if `weight_decay` is negative or not finite.
        """
        check_number(f"{NAME}.param_groups", "weight_decay", weight_decay, fix="Use for example 1e-4.")
        own = {id(p): p for layer in self.layers for p in layer.gate.parameters()}
        others = [p for p in self.model.parameters() if id(p) not in own]
        groups: list[dict[str, Any]] = [{"params": others, "weight_decay": weight_decay}]
        if own:
            groups.append({"params": list(own.values()), "weight_decay": 0.0, **gate_options})
        return groups

    @torch.no_grad()
    def freeze(self) -> None:
        """Fixes the structure, to fine-tune the kept weights; under `target_density`, exactly at the target.

        The gates' parameters keep their values whatever the optimizer does, and take no more gradient. Under
        torch.distributed, whose reducers wait for every gradient they know of, that is a gradient of zeros.
        """
        if self.frozen:
            return
        if self.options.target_density is not None:
            self._select(1.0)
        self._check_ranks()
        self.frozen = True
        self._hold()
        log.info("%s: frozen after %d steps at %.1f %%", NAME, self.steps, 100 * self.density)
        empty = [layer.name for layer, mask in zip(self.layers, self.masks, strict=True) if not mask.any()]
        if empty:
            log.warning("%s: no block is left in %s: use a smaller gamma", NAME, ", ".join(empty))

    def fold(self) -> nn.Module:
        """Freezes, then `fold_zero_blocks`: the model, whose layers store the kept blocks only.

        Raises:
            LayerError: if the parameters are sharded over ranks.
        """
        for layer in self.layers:
            for parameter in layer.module.parameters():
                if hasattr(parameter, "full_tensor"):
                    fix = (
                        "Load the full state dict (torch.distributed.checkpoint.state_dict."
                        "get_model_state_dict) into an unsharded model with a sparsifier, and fold that."
                    )
                    raise LayerError(layer.name, "a whole weight", "one that is sharded over ranks", fix)
        self.freeze()
        self._folded = True
        return fold_zero_blocks(self.model, include=[n for layer in self.layers for n in layer.names])

    # ---- what it did ---------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Kept share of the selected layers' dense cost, by the budget chosen."""
        return self._budget.total(self.masks) / self._dense_cost

    @property
    def masks(self) -> Masks:
        """bool per layer, `[rows, cols]` or `[rows, taps, cols]`: the kept blocks."""
        return [layer.gate.kept for layer in self.layers]

    def __repr__(self) -> str:
        goal = ", ".join(
            f"{key}={value}"
            for key, value in (("gamma", self.options.gamma), ("target_density", self.options.target_density))
            if value is not None
        )
        bh, bw = self.options.block_shape
        state = "frozen, " if self.frozen else ""
        return (
            f"{NAME}({len(self.layers)} layers in {bh}x{bw} blocks, {goal}, importance="
            f"{self.options.importance!r}, {state}step {self.steps}, density {self.density:.3f})"
        )

    # ---- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Steps, freeze and what they are about. Scales and masks are in the model's own state dict."""
        return {
            "steps": self.steps,
            "frozen": self.frozen,
            "options": {**asdict(self.options), "block_shape": list(self.options.block_shape)},
            "layers": {layer.name: list(layer.gate.kept.shape) for layer in self.layers},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes where `state_dict` was taken. Load the model first: its scales and masks stay.

        Raises:
            PatternError: if the state is of another block shape or other layers; nothing is changed then.
            OptionError: if it is of another importance or mode.
        """
        where = f"{NAME}.load_state_dict"
        try:
            steps, frozen = int(state["steps"]), bool(state["frozen"])
            options, layers = dict(state["options"]), {k: list(v) for k, v in state["layers"].items()}
            block = tuple(options["block_shape"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            fix = "Save sparsifier.state_dict() beside the model's."
            raise OptionError(where, "what state_dict returned", repr(error), fix) from error
        if block != self.options.block_shape:
            fix = "Construct the sparsifier with the block shape that it was saved with."
            raise PatternError(where, f"blocks of {self.options.block_shape}", f"{block}", fix)
        mine = self.state_dict()
        for key in ("importance", "per_tap"):
            if options[key] != mine["options"][key]:
                fix = "Construct the sparsifier as it was when saved."
                raise OptionError(where, f"{key}={mine['options'][key]!r}", repr(options[key]), fix)
        if (options["gamma"] is None) != (self.options.gamma is None):
            fix = "Construct the sparsifier as it was when saved."
            raise OptionError(where, "the same of gamma and target_density", "the other one", fix)
        if layers != mine["layers"]:
            name = next(n for n in [*mine["layers"], *layers] if layers.get(n) != mine["layers"].get(n))
            fix = "Build the model, and select its layers, as when it was saved."
            expected = f"blocks {mine['layers'].get(name, 'of no such layer')}"
            raise PatternError(f"{where}: {name}", expected, f"{layers.get(name, 'none')}", fix)
        for key in ("gamma", "target_density", "schedule", "budget", "scope"):
            if options.get(key) != mine["options"][key]:
                log.warning("%s resumes with another %s: %s", NAME, key, mine["options"][key])
        self.steps, self.frozen = steps, frozen
        self._hold() if frozen else self._release()

    # ---- internals -----------------------------------------------------------------------------

    def _make_budget(
        self, device: str | torch.device | AnyDevice | None, inputs: tuple[Any, ...] | None
    ) -> Budget:
        kind, patterns = self.options.budget, [layer.full for layer in self.layers]
        if kind != "parameters" and not isinstance(inputs, tuple):
            fix = f"Costs in {kind} depend on sizes: pass example_inputs=(x,)."
            raise OptionError(NAME, "example_inputs to be a tuple", type(inputs).__name__, fix)
        if kind == "latency":
            assert inputs is not None
            first = next(self.model.parameters()).device
            spec = find_device(device if device is not None else first)
            return latency_budget(self.model, [layer.names for layer in self.layers], patterns, spec, inputs)
        uses = [1] * len(patterns)
        if kind == "macs":
            assert inputs is not None
            report = sparsity_report(self.model, *inputs)
            for i, layer in enumerate(self.layers):
                macs = sum(report[name].dense_macs or 0 for name in layer.names)
                uses[i] = max(1, macs // math.prod(layer.full.weight_shape))
        return weight_budget(patterns, uses, self.options.per_tap)

    def _target(self, pressure: float) -> float:
        """The cost that is allowed; an ulp more, so that 0.1 of 30 blocks is three."""
        assert self.options.target_density is not None
        density = 1 - (1 - self.options.target_density) * pressure
        return density * self._dense_cost * (1 + 1e-12)

    def _select(self, pressure: float) -> None:
        scores = [layer.gate.score(layer.strength(self.options.per_tap)) for layer in self.layers]
        if pressure == 0:
            masks = [torch.ones_like(layer.gate.kept) for layer in self.layers]
        elif self.options.scope == "layer":
            masks = self._select_per_layer(scores, pressure)
        else:
            masks = choose_blocks(scores, self._budget, self._target(pressure))
        for layer, mask in zip(self.layers, masks, strict=True):
            layer.gate.select(mask)
        self._check_ranks()

    def _select_per_layer(self, scores: Masks, pressure: float) -> Masks:
        share = self._target(pressure) / self._dense_cost
        masks: Masks = []
        for layer, score in zip(self.layers, scores, strict=True):
            own = weight_budget([layer.full], [1], self.options.per_tap)
            masks += choose_blocks([score], own, share * own.total([torch.ones_like(score).bool()]))
        return masks

    def _check_ranks(self) -> None:
        if self.synchronize:
            ranks.check_same_masks([layer.name for layer in self.layers], self.masks)

    def _hold(self) -> None:
        """From now on, `step` puts the gates' parameters back to the values they have now."""
        parameters = [p for layer in self.layers for p in layer.gate.parameters()]
        self._held = [(local_part(p), local_part(p).clone()) for p in parameters]
        if ranks.several():
            for layer in self.layers:
                if list(layer.gate.parameters()):
                    layer.gate.hold()
            return
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _release(self) -> None:
        self._held = []
        for layer in self.layers:
            layer.gate.hold(False)
            for parameter in layer.gate.parameters():
                parameter.requires_grad_(True)
