"""Arithmetic that stays numeric unless a size is symbolic: sympy is slow, and most sizes are known."""

from __future__ import annotations

import math
from typing import Any

import sympy

Number = Any
"""A float or an int, or a sympy expression in a layer's symbolic sizes."""


def number(expression: Number) -> Number:
    """The same as an int or a float where it is a number."""
    if isinstance(expression, sympy.Expr) and expression.is_number:
        return int(expression) if expression.is_integer else float(expression)
    return expression


def _plain(*values: Number) -> bool:
    return not any(isinstance(value, sympy.Basic) for value in values)


def maximum(*values: Number) -> Number:
    return max(values) if _plain(*values) else sympy.Max(*values)


def ceiling(value: Number) -> Number:
    return math.ceil(value - 1e-9) if _plain(value) else sympy.ceiling(value)


def where(condition: Any, yes: Number, no: Number) -> Number:
    """`yes` where the condition, which may be symbolic, holds, else `no`."""
    if isinstance(condition, bool):
        return yes if condition else no
    return sympy.Piecewise((yes, condition), (no, True))
