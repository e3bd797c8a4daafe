"""What a row of the kernel table is (`KernelVariant`), and how a chosen one travels (`KernelConfig`)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .errors import PlanError
from .packing import INPUT_MAJOR, PackedWeight, pack_weight
from .pattern import BlockPattern
from .plan import Site

Parameters = dict[str, "int | str"]


@dataclass(frozen=True)
class KernelConfig:
    """A kernel variant and its parameters, as they travel in the `kernel` argument of an operator.

    The text names everything that changes the generated code, the pattern too, so that compilation caches
    see it: `"cpu_f32;chunk=4;row_threads=1;pattern=0123456789abcdef"`.
    """

    variant: str
    parameters: Mapping[str, int | str] = field(default_factory=dict)

    def encode(self, pattern: BlockPattern | None = None) -> str:
        parts = [f"{key}={value}" for key, value in sorted(self.parameters.items())]
        if pattern is not None:
            parts.append(f"pattern={pattern.digest}")
        return ";".join([self.variant, *parts])

    @classmethod
    def decode(cls, text: str) -> KernelConfig:
        """Inverse of `encode`, without the pattern's digest. Raises `PlanError` on other text."""
        variant, *parts = text.split(";")
        pairs = [part.partition("=") for part in parts]
        if not variant or any(not key or not separator for key, separator, _ in pairs):
            raise PlanError("kernel", "'variant;key=value;...'", repr(text), "Use KernelConfig.encode().")
        parameters = {key: _number(value) for key, _, value in pairs if key != "pattern"}
        return cls(variant, parameters)


def _number(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


@dataclass(frozen=True)
class KernelVariant(ABC):
    """A way to run a block-sparse layer.

    Args:
        name: as it appears in plans.
        device: device type.
        dtypes: supported dtypes.
        ops: supported ops (`Site.op`).
        weight_layout: how tiles are stored, see `packing`.
        stand_in: name of the row that runs the same weights where a device lacks this one's instructions.
    """

    name: str
    device: str
    dtypes: tuple[str, ...]
    ops: tuple[str, ...]
    weight_layout: str = INPUT_MAJOR
    stand_in: str = ""

    def unsupported(self, site: Site, pattern: BlockPattern) -> str | None:
        """Why this kernel cannot run the layer on any device of its type, as a phrase; None if it can."""
        if site.device.partition(":")[0] != self.device:
            return f"runs on {self.device}, not on {site.device}"
        if site.dtype not in self.dtypes:
            return f"no kernel for {site.dtype}"
        if site.op not in self.ops:
            return f"no kernel for {site.op}"
        bh, bw = pattern.block_shape
        if min(pattern.in_channels, pattern.group_channels[1]) < bw:
            return f"block width {bw} exceeds the input channels"
        out_per_group, in_per_group = pattern.group_channels
        if pattern.groups > 1 and (out_per_group % bh or in_per_group % bw):
            return f"blocks of {bh}x{bw} straddle groups of {out_per_group}x{in_per_group} channels"
        return self._unsupported_blocks(pattern) or self._unsupported_site(site, pattern)

    def _unsupported_blocks(self, pattern: BlockPattern) -> str | None:
        return None

    def _unsupported_site(self, site: Site, pattern: BlockPattern) -> str | None:
        return None

    @abstractmethod
    def configs(self, site: Site, pattern: BlockPattern, device: Any) -> list[Parameters]:
        """Candidate parameters, best guess first; none if this device cannot run the kernel."""

    def describe(self, site: Site, pattern: BlockPattern, device: Any, config: Mapping[str, Any]) -> str:
        """How the kernel runs the layer with these parameters, as a phrase for the user; may be empty."""
        return ""

    def pack(self, weight: Tensor, pattern: BlockPattern) -> PackedWeight:
        """The weight `[O, C/groups, *kernel]` as this kernel reads it."""
        return pack_weight(weight, pattern, self.weight_layout)


def output_pixels(site: Site) -> int | None:
    """Rows of the implicit matrix product; None if a size is symbolic."""
    sizes = site.input_shape[:1] + site.output_spatial if site.kernel_size else site.input_shape[:-1]
    if any(isinstance(size, str) for size in sizes):
        return None
    return math.prod(int(size) for size in sizes)
