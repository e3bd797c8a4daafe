"""When sparsity sets in: warm-up, ramp, cycles, freeze."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import OptionError

RAMPS = ("constant", "linear", "cubic")


@dataclass(frozen=True)
class SparsitySchedule:
    """How the strength of the penalty, or the sparsity, grows over the steps of a training.

    After `warmup` steps, the pressure grows from 0 to 1 over `ramp` steps with `τ = (step - warmup) / ramp`:
    at once (`"constant"`), as `τ`, or as `1 - (1 - τ)³` (`"cubic"`; Zhu and Gupta, "To prune, or not to
    prune", 2017: sparsity `s_f + (s_i - s_f)(1 - τ)³` with `s_i = 0`). From step `freeze` on, the structure
    stays and the kept weights are fine-tuned.

    With `cycles`, the steps from `warmup` to `freeze` are divided into so many equal cycles, each a third
    dense, a third ramp and a third sparse: pruned blocks return in every dense phase and may win the next.

    Args:
        warmup: dense steps at the start.
        ramp: steps from no pressure to all of it; 0 for at once.
        shape: of the ramp.
        freeze: the step after which the structure is fixed; None to leave that to `BlockSparsifier.freeze`.
        every: steps between two selections of blocks.
        cycles: number of dense-ramp-sparse cycles; 0 for one ramp.

    Raises:
        OptionError: on negative counts, an unknown shape, a freeze before the ramp ends, or cycles without
            a freeze or with a ramp.
    """

    warmup: int = 0
    ramp: int = 0
    shape: Literal["constant", "linear", "cubic"] = "cubic"
    freeze: int | None = None
    every: int = 1
    cycles: int = 0

    def __post_init__(self) -> None:
        least = {"warmup": 0, "ramp": 0, "every": 1, "cycles": 0}
        for option, bound in least.items():
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise _error(f"{option} to be a whole number >= {bound}", repr(value), "Count in steps.")
        if self.shape not in RAMPS:
            raise _error(f"shape to be one of {', '.join(RAMPS)}", repr(self.shape), "Use one of these.")
        if self.freeze is not None and self.freeze < max(1, self.warmup + self.ramp):
            fix = "Freeze later, or ramp faster."
            raise _error(
                f"freeze >= {max(1, self.warmup + self.ramp)}, the end of the ramp", f"{self.freeze}", fix
            )
        if self.cycles and (self.freeze is None or self.ramp):
            got = f"freeze={self.freeze}, ramp={self.ramp}"
            raise _error("a freeze step and no ramp with cycles", got, "Each cycle has a ramp of its own.")

    def pressure(self, step: int) -> float:
        """Between 0 (dense) and 1 (all of γ, or the target density), for the step that just ended, from 1."""
        if self.freeze is not None and step >= self.freeze:
            return 1.0
        if step < self.warmup or not (self.ramp or self.cycles):
            return float(step >= self.warmup)
        if self.cycles:
            assert self.freeze is not None
            position = (step - self.warmup) * self.cycles / (self.freeze - self.warmup) % 1
            return self._shaped(min(1.0, max(0.0, 3 * position - 1)))
        return self._shaped(min(1.0, (step - self.warmup) / self.ramp))

    def _shaped(self, tau: float) -> float:
        if self.shape == "constant":
            return float(tau > 0)
        return tau if self.shape == "linear" else 1 - (1 - tau) ** 3


def _error(expected: str, got: str, fix: str) -> OptionError:
    return OptionError("SparsitySchedule", expected, got, fix)
