"""Notices changed contents of tensors on a GPU without waiting for it.

Reading an element on the host would wait for all that the GPU has queued. So samples are copied to the host
asynchronously, in the stream of the calls, at most every `PERIOD` seconds, and compared when they have
arrived: a change that torch does not count (through `.data`) is noticed within a few calls after that, not
at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PERIOD = 0.05
"""Least seconds between two samples: what they cost the host (some 0.1 ms for a hundred tensors) is then
lost in the noise."""
SAMPLES = 16
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class DeviceSamples:
    """Watches the memory of tensors on one device.

    Args:
        tensors: on one device, without gaps in memory (`flat_memory`).
        full: compare all contents at every call, waiting for the device; else a few elements, as above.
        clock: seconds, for tests.
    """

    def __init__(
        self, tensors: Sequence[Tensor], *, full: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._device = tensors[0].device
        self._full, self._clock = full, clock
        with torch.inference_mode(False), torch.no_grad():
            self._views = [_flat(t) if full else _sampled(_flat(t)) for t in tensors]
            sizes = {view.element_size() for view in self._views}
            self._groups = [[v for v in self._views if v.element_size() == size] for size in sizes]
            self._known = self._read().cpu()
            self._host = torch.empty_like(self._known, pin_memory=self._device.type == "cuda")
        self._arrived: torch.cuda.Event | None = None
        self._pending = False
        self._next = self._clock() + PERIOD

    def changed(self) -> bool:
        """Whether contents that have arrived differ from the first; asks for new ones when it is time."""
        if _is_capturing(self._device):  # copies made now would be replayed with the graph
            return False
        if self._full:
            return not torch.equal(self._read().cpu(), self._known)
        if self._pending and (self._arrived is None or self._arrived.query()):
            self._pending = False
            if not torch.equal(self._host, self._known):
                return True
        if not self._pending and self._clock() >= self._next:
            self._request()
        return False

    def _request(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._host.copy_(self._read(), non_blocking=True)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                self._arrived = torch.cuda.Event()
                self._arrived.record()
        self._pending = True
        self._next = self._clock() + PERIOD

    def _read(self) -> Tensor:
        """On the device: the bytes of the samples, by few kernels, or a sum per tensor."""
        if self._full:
            return torch.stack([view.sum(dtype=torch.int64) for view in self._views])
        return torch.cat([torch.cat(group).view(torch.uint8) for group in self._groups])


def flat_memory(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill a stretch of memory without gaps."""
    if tensor.layout != torch.strided or not tensor.numel():
        return False
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return extent == tensor.numel()


def _flat(tensor: Tensor) -> Tensor:
    """The memory as integers, so that NaN equals itself."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(_WORDS.get(flat.element_size(), torch.int64))


def _sampled(flat: Tensor) -> Tensor:
    # Not a round fraction: that would see few input channels, which may all be pruned.
    return flat[:: max(1, int(flat.numel() * 0.9173 / SAMPLES))]


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
