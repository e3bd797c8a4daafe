"""Small JSON files in the user's cache folder. A file that cannot be read or written costs time, never
an answer."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import platformdirs
import torch

log = logging.getLogger("blocksparse_compiler")


def cache_dir() -> Path:
    """`$BLOCKSPARSE_CACHE_DIR`, or the platform's cache folder for this package. May not exist yet."""
    chosen = os.environ.get("BLOCKSPARSE_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("blocksparse_compiler"))


def cache_path(kind: str, key: Any) -> Path:
    """The file for `key`, any JSON value. `kind` names what is stored (`"calibration"`)."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return cache_dir() / f"{kind}-{digest}.json"


def load(kind: str, key: Any) -> Any | None:
    """What `store` wrote for this key; `None` if there is nothing, or nothing readable."""
    path = cache_path(kind, key)
    try:
        return json.loads(path.read_text())["value"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("ignoring the unreadable cache file %s (%s)", path, error)
        return None


def store(kind: str, key: Any, value: Any) -> Path | None:
    """Writes `value` (JSON) so that readers see all of it or nothing; `None` if the folder refuses."""
    path = cache_path(kind, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"key": key, "value": value}, file, indent=1, default=str)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        log.info("cannot write the cache file %s (%s)", path, error)
        return None
    return path


@functools.cache
def versions() -> tuple[str, ...]:
    """What every stored measurement depends on: the processor, torch and our kernels' sources."""
    from .codegen.lowerings import source_digest

    return processor(), torch.__version__, source_digest()


@functools.cache
def processor() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "cpu model", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
