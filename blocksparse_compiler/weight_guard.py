"""Notices that a tensor which was compiled into a kernel has changed.

torch counts in-place writes (`_version`), but not those through `.data`, nor any on inference tensors.
So next to identity and version a few elements of every tensor are compared on each call, and a slice of
all contents in turn. For ResNet-50 (268 tensors, 100 MB) that costs about 0.1 ms a call. Tensors on a GPU
are sampled without waiting for it, see `device_samples`.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .device_samples import DeviceSamples, flat_memory

_VERSION = operator.attrgetter("_version")
_SAMPLES = 4
_SLICE_WORDS = 1 << 12  # compared in full per call, in turn


class WeightGuard:
    """Watches `tensors` as they are now, without keeping them alive.

    Args:
        tensors: the tensors, in the order in which `changed` will be given their successors.
        level: "version", "sample" or "full" (see `BackendOptions.guard`).
    """

    def __init__(self, tensors: Sequence[Tensor], level: str = "sample") -> None:
        self._level = level
        self._references = [weakref.ref(t) for t in tensors]
        self._counted = [i for i, t in enumerate(tensors) if not t.is_inference()]
        self._placed = [i for i, t in enumerate(tensors) if t.layout == torch.strided]
        self._versions, self._pointers = self._counters(tensors)
        memory = [] if level == "version" else [_memory(t) for t in tensors]
        self._samples = _Samples([m for m in memory if m is not None and m.size])
        self._slices = [part for m in self._samples.arrays for part in _split(m)]
        self._sums = [_checksum(part) for part in self._slices]
        self._turn = 0
        self._elsewhere = [] if level == "version" else _elsewhere(tensors, full=level == "full")

    def changed(self, tensors: Sequence[Any]) -> bool:
        """Whether any of `tensors` is another tensor, or holds other values, than when watching began."""
        if not self.watches(tensors):
            return True
        if self._counters(tensors) != (self._versions, self._pointers):
            return True
        if any(samples.changed() for samples in self._elsewhere):
            return True
        return bool(self._slices) and (self._samples.changed() or self._contents_changed())

    def watches(self, tensors: Sequence[Any]) -> bool:
        """Whether these are the very tensors that watching began with, whatever they hold now."""
        return all(ref() is t for ref, t in zip(self._references, tensors, strict=True))

    @property
    def orphaned(self) -> bool:
        """Whether a watched tensor is gone, so that nobody can ask about them all again."""
        return any(ref() is None for ref in self._references)

    def _counters(self, tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        # `map` over C functions: a tenth of a millisecond less for 300 tensors than a loop in Python.
        counted, placed = _picked(tensors, self._counted), _picked(tensors, self._placed)
        return list(map(_VERSION, counted)), list(map(Tensor.data_ptr, placed))

    def _contents_changed(self) -> bool:
        if self._level == "full":
            return any(_checksum(part) != old for part, old in zip(self._slices, self._sums, strict=True))
        i = self._turn
        self._turn = (i + 1) % len(self._slices)
        return _checksum(self._slices[i]) != self._sums[i]


class _Samples:
    """A few evenly spaced elements of each array, and what they were."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = list(arrays)
        views = [a[:: max(1, -(-a.size // _SAMPLES))] for a in arrays]
        kinds = sorted({v.dtype.str for v in views})
        self._groups = [[v for v in views if v.dtype.str == kind] for kind in kinds]
        self._known = self._read()

    def changed(self) -> bool:
        return self._read() != self._known

    def _read(self) -> list[bytes]:
        return [np.concatenate(group).tobytes() for group in self._groups]


def _picked(tensors: Sequence[Tensor], indices: Sequence[int]) -> Sequence[Tensor]:
    """The tensors at these ascending positions."""
    return tensors if len(indices) == len(tensors) else [tensors[i] for i in indices]


def _memory(t: Tensor) -> np.ndarray | None:
    """The tensor's memory as a flat integer array (so that NaN equals itself), or None if it has gaps."""
    if t.device.type != "cpu" or not flat_memory(t):
        return None
    with torch.inference_mode(False), torch.no_grad():
        flat = t.detach().as_strided((t.numel(),), (1,))
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64)
        return flat.view(words).numpy()


def _elsewhere(tensors: Sequence[Tensor], *, full: bool) -> list[DeviceSamples]:
    """Samples of the tensors on each GPU."""
    groups: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        if t.device.type == "cuda" and flat_memory(t):
            groups.setdefault(t.device, []).append(t)
    return [DeviceSamples(group, full=full) for group in groups.values()]


def _split(memory: np.ndarray) -> list[np.ndarray]:
    return np.array_split(memory, -(-memory.size // _SLICE_WORDS))


def _checksum(part: np.ndarray) -> int:
    return int(np.add.reduce(part, dtype=np.int64))
