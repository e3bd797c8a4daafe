"""Kernel parameters that were measured fastest, by GPU: the files `tuned/<device>.json` of this package.

`python -m benchmarks.layers --device cuda --tuned` writes one. A layer takes the entry of its kernel variant
that was measured at nearly its size; where there is none, the variant guesses.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .kernel_variant import Parameters, output_pixels
from .pattern import BlockPattern
from .plan import Site

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "tuned"
REACH = 2.0
"""Entries count for a layer that differs by this many doublings, of pixels and tiles together."""

Entry = dict[str, Any]


def shape_class(variant: str, site: Site, pattern: BlockPattern) -> Entry | None:
    """What an entry is found by; None while the layer's size is symbolic.

    Two layers of one class differ in `pixels` (rows of the product) and `tiles` (most of one block row).
    """
    pixels = output_pixels(site)
    if not pixels:
        return None
    return {
        "variant": variant,
        "geometry": _geometry(site),
        "block": "x".join(map(str, pattern.block_shape)),
        "dtype": site.dtype,
        "pixels": pixels,
        "tiles": max(1, int(pattern.ungroup().kept.sum((1, 2)).max())),
    }


def best(variant: str, site: Site, pattern: BlockPattern, device: str) -> Parameters | None:
    """The measured parameters for this layer on the GPU of this name, if there are any."""
    entries = table(device)
    wanted = shape_class(variant, site, pattern) if entries else None
    if wanted is None:
        return None
    near = [(distance, entry) for entry in entries if (distance := _distance(entry, wanted)) <= REACH]
    return dict(min(near, key=lambda pair: pair[0])[1]["config"]) if near else None


def prefer(
    variant: str, site: Site, pattern: BlockPattern, device: str, configs: list[Parameters]
) -> list[Parameters]:
    """`configs` with the measured parameters, if there are any, in front."""
    first = best(variant, site, pattern, device)
    return configs if first is None else [first, *(config for config in configs if config != first)]


@functools.cache
def table(device: str) -> tuple[Entry, ...]:
    """All entries for a GPU; none for one that was never measured, or whose file is damaged."""
    path = FOLDER / f"{device}.json"
    try:
        entries = tuple(json.loads(path.read_text())["entries"])
        for entry in entries:
            dict(entry["config"]), math.log2(entry["pixels"]), math.log2(entry["tiles"])
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%r): kernels guess their parameters. Measure again.", path, error)
        return ()
    return entries


def write(path: Path, device: str, entries: Iterable[Entry], measured_with: Mapping[str, str]) -> None:
    """Writes the entries, one per line; of several for one class the fastest (`ms`) stays."""
    fastest: dict[str, Entry] = {}
    for entry in entries:
        key = json.dumps({k: v for k, v in entry.items() if k not in ("config", "ms")}, sort_keys=True)
        if key not in fastest or entry["ms"] < fastest[key]["ms"]:
            fastest[key] = entry
    lines = ",\n  ".join(json.dumps(entry) for entry in fastest.values())
    head = json.dumps({"device": device, "measured_with": dict(measured_with)}, indent=1)[:-2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "entries": [\n  {lines}\n ]\n}}\n')
    table.cache_clear()


def _geometry(site: Site) -> str:
    if not site.kernel_size:
        return "linear"
    return "x".join(map(str, site.kernel_size)) + "/" + "x".join(map(str, site.stride))


def _distance(entry: Entry, wanted: Entry) -> float:
    """Doublings between the sizes of two classes; infinite if they differ in anything else."""
    sizes = ("pixels", "tiles")
    if any(entry.get(key) != value for key, value in wanted.items() if key not in sizes):
        return math.inf
    return sum(abs(math.log2(entry[key] / wanted[key])) for key in sizes)
