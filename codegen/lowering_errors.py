"""Why a layer gets no generated kernel."""

from __future__ import annotations


class Unsupported(Exception):
    """Why a layer runs as the opaque operator."""
