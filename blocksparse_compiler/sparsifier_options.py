"""What `BlockSparsifier` can be asked for, checked in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .budget import BUDGETS
from .errors import OptionError, check_number
from .gates import BlockGate
from .importance import IMPORTANCES
from .pattern import BlockShape, check_block_shape
from .scales import BlockScale
from .schedule import SparsitySchedule

NAME = "BlockSparsifier"


@dataclass(frozen=True)
class SparsifierOptions:
    """What `BlockSparsifier` was asked for; checked here. Fields as there."""

    block_shape: BlockShape
    gamma: float | None = None
    target_density: float | None = None
    budget: Literal["parameters", "macs", "latency"] = "parameters"
    scope: Literal["global", "layer"] = "global"
    importance: str = "scales"
    per_tap: bool = False
    schedule: SparsitySchedule = field(default_factory=SparsitySchedule)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_shape", check_block_shape(self.block_shape, NAME))
        gamma, density = self.gamma, self.target_density
        if (gamma is None) == (density is None):
            got = "neither" if gamma is None else "both"
            raise OptionError(NAME, "either gamma or target_density", got, "Pass one of the two.")
        if gamma is not None:
            check_number(NAME, "gamma", gamma, fix="Try 0.01 and look at the density.")
        if density is not None:
            check_number(NAME, "target_density", density, fix="Use 0.5 to keep half.", share=True)
        _check_one_of("budget", self.budget, BUDGETS)
        _check_one_of("scope", self.scope, ("global", "layer"))
        _check_one_of("importance", self.importance, tuple(IMPORTANCES))
        if gamma is not None and self.importance != "scales":
            fix = "Pass target_density with this importance."
            raise OptionError(NAME, 'importance="scales" with gamma', repr(self.importance), fix)
        if gamma is not None and self.schedule.cycles:
            fix = "Cycles choose blocks to a target_density."
            raise OptionError(NAME, "a schedule without cycles with gamma", f"{self.schedule.cycles}", fix)
        if self.scope == "layer" and self.budget == "latency":
            fix = 'A small layer may have no sparse kernel that pays; use scope="global".'
            raise OptionError(NAME, 'scope="global" with budget="latency"', '"layer"', fix)
        if self.per_tap and not IMPORTANCES[self.importance].per_tap:
            fix = 'Only importance="magnitude" tells the taps of a block apart.'
            raise OptionError(NAME, "per_tap=False", f"True with {self.importance!r}", fix)

    @property
    def gate_type(self) -> type[BlockGate]:
        return BlockScale if self.gamma is not None else IMPORTANCES[self.importance]


def _check_one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        expected = f"{option} to be one of {', '.join(allowed)}"
        raise OptionError(NAME, expected, repr(value), "Use one of these.")
