"""How activations lie in memory on either side of a layer.

*Channels last*: the channels of a pixel are neighbours (NHWC), as dense convolutions want it.
*Channels first*: the pixels of a channel are neighbours (NCHW), as kernels with vectors along pixels want it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIRST = "channels_first"


@dataclass(frozen=True)
class Layouts:
    """What a kernel reads and writes; as parameters of a kernel, only what is channels first is named."""

    reads_first: bool = False
    writes_first: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Layouts:
        return cls(config.get("reads") == FIRST, config.get("writes") == FIRST)

    @property
    def parameters(self) -> dict[str, int | str]:
        sides = {"reads": self.reads_first, "writes": self.writes_first}
        return {side: FIRST for side, is_first in sides.items() if is_first}

    def __str__(self) -> str:
        """As in the table of a plan."""
        before, after = ("first" if side else "last" for side in (self.reads_first, self.writes_first))
        return before if before == after else f"{before} → {after}"


CHANNELS_LAST = Layouts()
CHANNELS_FIRST = Layouts(True, True)
