"""Periodic kernels (pSConv) in memory: values and one small table, no index of which weight is where.

Which taps a kernel keeps depends on `(o + c) mod period` alone, so the values of a layer are stored in order
and every position follows from the table. Compare `storage_bytes`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import LayerError, PatternError
from .schemes import PeriodicKernels

_HEADER = struct.Struct("<4I")  # period, out channels, input channels per group, number of kernel sizes
_MAGIC = b"BSPK"


@dataclass(frozen=True, eq=False)
class PeriodicWeight:
    """The kept values of a weight `[O, C/groups, *kernel]` under a `PeriodicKernels` scheme.

    Args:
        shape: of the dense weight.
        table: bool `[period, taps]`: the taps that kernel (o, c) keeps, by `(o + c + 1) mod period`.
        values: `[n]`, kernel by kernel (o, then c), taps in order.
    """

    shape: tuple[int, ...]
    table: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, scheme: PeriodicKernels) -> PeriodicWeight:
        """Packs a weight that is zero outside the scheme's pattern.

        Raises:
            LayerError: if it is not.
            PatternError: if the scheme does not fit the weight.
        """
        shape = tuple(weight.shape)
        scheme.pattern("weight", shape, 1)  # raises if it does not fit
        column = scheme.pattern("table", (scheme.period, 1, *shape[2:]), 1).mask().flatten(2)[:, 0]
        table = column.roll(1, 0)  # output channel o of input channel 0 has residue o + 1
        mask = _mask(shape, table)
        outside = int(weight.detach().masked_fill(mask.to(weight.device), 0).count_nonzero())
        if outside:
            fix = "Mask it first: apply_pattern(model, scheme)."
            raise LayerError("PeriodicWeight", "zeros outside the pattern", f"{outside} nonzeros", fix)
        return cls(shape, table, weight.detach()[mask.to(weight.device)])

    def to_dense(self) -> Tensor:
        dense = self.values.new_zeros(self.shape)
        dense[_mask(self.shape, self.table).to(dense.device)] = self.values
        return dense

    @property
    def nbytes(self) -> int:
        """Of values and table, as `to_bytes` writes them; its header adds 28 bytes for a 2-D kernel."""
        return self.values.numel() * self.values.element_size() + _bytes(self.table.numel())

    def to_bytes(self) -> bytes:
        """The values as float32 after a header and the table's bits."""
        if self.values.dtype != torch.float32:
            fix = "Convert it first."
            raise PatternError("PeriodicWeight.to_bytes", "float32 values", f"{self.values.dtype}", fix)
        kernel = self.shape[2:]
        header = _MAGIC + _HEADER.pack(len(self.table), *self.shape[:2], len(kernel))
        header += struct.pack(f"<{len(kernel)}I", *kernel)
        bits = sum(1 << i for i, kept in enumerate(self.table.flatten().tolist()) if kept)
        return (
            header + bits.to_bytes(_bytes(self.table.numel()), "little") + self.values.cpu().numpy().tobytes()
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> PeriodicWeight:
        """Inverse of `to_bytes`. Raises `PatternError` on anything else."""
        try:
            if data[:4] != _MAGIC:
                raise ValueError(f"a header {data[:4]!r}")
            period, out, inputs, dims = _HEADER.unpack_from(data, 4)
            kernel = struct.unpack_from(f"<{dims}I", data, 4 + _HEADER.size)
            taps, start = math.prod(kernel), 4 + _HEADER.size + 4 * dims
            end = start + _bytes(period * taps)
            bits = int.from_bytes(data[start:end], "little")
            table = torch.tensor([bool(bits >> i & 1) for i in range(period * taps)]).reshape(period, taps)
            values = torch.frombuffer(bytearray(data[end:]), dtype=torch.float32)
            shape = (out, inputs, *kernel)
            expected = int(_mask(shape, table).sum())
            if len(values) != expected:
                raise ValueError(f"{len(values)} values instead of {expected}")
        except (ValueError, struct.error, RuntimeError) as error:
            fix = "Write it again with to_bytes."
            raise PatternError("PeriodicWeight.from_bytes", "what to_bytes wrote", str(error), fix) from error
        return cls(shape, table, values)


def storage_bytes(weight: Tensor, scheme: PeriodicKernels) -> dict[str, int]:
    """Bytes of a masked weight `[O, C/groups, *kernel]` in four formats.

    `"dense"` all values; `"bitmap"` kept values and one bit per weight; `"csr"` kept values, an int32 column
    for each, and int32 row pointers, rows being output channels; `"periodic"` kept values and one table of
    `period * taps` bits.
    """
    packed = PeriodicWeight.from_dense(weight, scheme)
    kept, size = packed.values.numel(), weight.element_size()
    return {
        "dense": weight.numel() * size,
        "bitmap": kept * size + _bytes(weight.numel()),
        "csr": kept * (size + 4) + 4 * (weight.shape[0] + 1),
        "periodic": packed.nbytes,
    }


def _mask(shape: tuple[int, ...], table: Tensor) -> Tensor:
    """bool, like the weight: `table[(o + c + 1) mod period]`."""
    residue = (torch.arange(shape[0])[:, None] + torch.arange(shape[1]) + 1) % len(table)
    return table[residue].reshape(shape)


def _bytes(bits: int) -> int:
    return -(-bits // 8)
