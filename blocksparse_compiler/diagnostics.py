"""What this installation is made of, and whether it works."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil

import torch

from . import disk_cache
from .devices import DeviceSpec

_LIBRARIES = ("numpy", "sympy", "networkx", "rich", "typer", "jinja2", "triton")


def facts() -> dict[str, str]:
    """Versions, the machine and the folders, as `blocksparse info` prints them."""
    from . import __version__
    from .calibrate import describe_state

    host = DeviceSpec.host()
    return {
        "blocksparse_compiler": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "libraries": ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES if _version(name)),
        "processor": disk_cache.processor(),
        "vectors": f"{host.isa}, {host.vector_bits} bits",
        "threads": str(host.threads),
        "C++ compiler": _compiler(),
        "backend": _backend(),
        "cache folder": str(disk_cache.cache_dir()),
        "calibration": describe_state(),
    }


def self_test() -> str | None:
    """Compiles a small block-sparse model and compares it with eager torch; what went wrong, or `None`."""
    from .pattern import BlockPattern

    weight = torch.randn(64, 64, 3, 3) / 24
    full = BlockPattern.full(weight.shape, (32, 32))
    kept = full.kept.clone()
    kept[0, :, 0] = False
    model = torch.nn.Conv2d(64, 64, 3, padding=1).eval()
    model.weight.data = full.with_kept(kept).apply(weight)
    x = torch.randn(2, 64, 16, 16).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            expected = model.double()(x.double())
            got = torch.compile(model.float(), backend="blocksparse", options={"dense": "never"})(x)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    difference = (got - expected).abs().max().item()
    return None if difference < 1e-4 else f"the compiled model is off by {difference:.1e}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str:
    found = next((path for name in ("g++", "clang++") if (path := shutil.which(name))), None)
    return found or "none found: install g++ or clang++ (or set CXX)"


def _backend() -> str:
    known = torch.compiler.list_backends(exclude_tags=())
    return (
        "found by torch.compile" if "blocksparse" in known else "not registered: install the package with pip"
    )
