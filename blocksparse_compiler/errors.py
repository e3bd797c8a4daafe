"""Every error this package raises on purpose: who, what was expected, what came, what to change."""

from __future__ import annotations

import math


class BlockSparseError(ValueError):
    """Bad input. The message names the layer (or object), the expectation, the finding and the remedy.

    Args:
        where: qualified name of the layer, or of the function or option at fault.
        expected: what the code needs.
        got: what it found.
        fix: what the user can change.
    """

    def __init__(self, where: str, expected: str, got: str, fix: str) -> None:
        self.where, self.expected, self.got, self.fix = where, expected, got, fix
        super().__init__(f"{where}: expected {expected}, got {got}. {fix}")


class PatternError(BlockSparseError):
    """A block shape, tile grid or set of values that does not describe the weight it is used with."""


class LayerError(BlockSparseError):
    """A layer, or a state of a model, that an operation cannot be applied to."""


class OptionError(BlockSparseError):
    """An unknown option, or a value that an option cannot take."""


class PlanError(BlockSparseError):
    """A plan that does not fit the graph it is applied to, or a file that is not a plan."""


class StaleWeightError(RuntimeError):
    """A weight changed after compilation and recompiling is not possible."""


def check_number(where: str, option: str, value: object, *, fix: str, share: bool = False) -> None:
    """Raises `OptionError` unless `value` is a finite number >= 0; if a share, unless it is in (0, 1]."""
    number = isinstance(value, int | float) and math.isfinite(value)
    if not number or not (0 < value <= 1 if share else value >= 0):  # type: ignore[operator]
        expected = f"{option} in (0, 1]" if share else f"a finite {option} >= 0"
        raise OptionError(where, expected, repr(value), fix)
