"""What NVIDIA's machine code (SASS, as `nvdisasm -c` prints it) does in its main loop."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Loop:
    """The instructions of one loop body, predicates taken off."""

    instructions: tuple[str, ...]

    def count(self, pattern: str) -> int:
        """Instructions whose text starts with this pattern."""
        return sum(re.match(pattern, text) is not None for text in self.instructions)

    def waits(self, pattern: str) -> list[int]:
        """What waits that match leave in flight: the last number of each."""
        found = [text for text in self.instructions if re.match(pattern, text)]
        return [int(re.findall(r"0x[0-9a-f]+", text)[-1], 16) for text in found]


MATRIX = r"[HQ]G?MMA"


def main_loops(sass: str) -> list[Loop]:
    """The innermost loops that hold matrix instructions, in order."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(found.group(1))
            branch = re.match(r"BRA.*`\((\.L_x_\d+)\)", found.group(1))
            if branch and branch.group(1) in labels:  # else it leads forward
                spans.append((labels[branch.group(1)], len(instructions)))
    inner = [a for a in spans if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in spans)]
    loops = [Loop(tuple(instructions[start:end])) for start, end in inner]
    return [loop for loop in loops if loop.count(MATRIX)]
