"""Notices that a tensor which was compiled into a kernel has changed.

torch counts in-place writes (`_version`), but not those through `.data`, nor any on inference tensors.
So next to identity and version a few elements of every tensor are compared on each call, and one tensor
as a whole in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_SAMPLES = 32
_SLICE_BYTES = 1 << 20  # compared in full per call, in turn: about 30 µs


class WeightGuard:
    """Watches `tensors` as they are now.

    Args:
        tensors: the tensors, in the order in which `changed` will be given their successors.
        level: "version", "sample" or "full" (see `BackendOptions.guard`).
    """

    def __init__(self, tensors: Sequence[Tensor], level: str = "sample") -> None:
        self._level = level
        self._tensors = list(tensors)
        self._versions = [_version(t) for t in tensors]
        self._pointers = [_pointer(t) for t in tensors]
        self._views: list[Tensor] = []
        self._slices: list[Tensor] = []
        if level != "version":
            with torch.inference_mode(False), torch.no_grad():
                self._watch_contents()

    def _watch_contents(self) -> None:
        flat = [_bytes(t) for t in self._tensors]
        flat = [f for f in flat if f is not None and f.numel()]
        step = _SLICE_BYTES // 4
        self._slices = [part for f in flat for part in f.split(step)]
        self._sums = [_checksum(part) for part in self._slices]
        self._views = [f[:: max(1, f.numel() // _SAMPLES)] for f in flat]
        self._sampled = torch.cat(self._views) if self._views else None
        self._turn = 0

    def changed(self, tensors: Sequence[Any]) -> bool:
        """Whether any of `tensors` is another tensor, or holds other values, than when watching began."""
        for now, old, version, pointer in zip(
            tensors, self._tensors, self._versions, self._pointers, strict=True
        ):
            if now is not old or _version(now) != version or _pointer(now) != pointer:
                return True
        return bool(self._views) and self._contents_changed()

    def _contents_changed(self) -> bool:
        with torch.no_grad():
            if not torch.equal(torch.cat(self._views), self._sampled):
                return True
            if self._level == "full":
                return any(_checksum(s) != c for s, c in zip(self._slices, self._sums, strict=True))
            i = self._turn
            self._turn = (i + 1) % len(self._slices)
            return _checksum(self._slices[i]) != self._sums[i]


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _pointer(t: Tensor) -> int:
    return t.data_ptr() if t.layout == torch.strided else 0


def _bytes(t: Tensor) -> Tensor | None:
    """The tensor's memory as a flat integer view (so that NaN equals itself), or None if it has gaps."""
    if t.layout != torch.strided or t.device.type != "cpu":
        return None
    plain = t.detach()
    dense = sum((n - 1) * s for n, s in zip(plain.shape, plain.stride(), strict=True)) + 1 == plain.numel()
    if not dense:
        return None
    flat = plain.as_strided((plain.numel(),), (1,))
    size = flat.element_size()
    return (
        flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32}.get(size, torch.int64))
        if size <= 8
        else None
    )


def _checksum(part: Tensor) -> int:
    """Order-sensitive enough: a plain sum and the sum of the first half in int64."""
    return hash((int(part.sum(dtype=torch.int64)), int(part[: part.numel() // 2].sum(dtype=torch.int64))))
