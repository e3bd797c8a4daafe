"""What the specs of all kinds of devices share: checks, replacement with sources, digest, JSON."""

from __future__ import annotations

import builtins
import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar, TypeVar

from .errors import OptionError

Spec = TypeVar("Spec", bound="Figures")


class Figures:
    """Base of frozen dataclasses whose fields are figures of a device, each with its source.

    Subclasses have the fields `name`, `efficiency` (fractions by name) and `sources` (by field name;
    `"efficiency <name>"` for single fractions), and call `check` in `__post_init__`.
    """

    type: ClassVar[str]
    """Device type, as in `torch.device.type`."""
    example: ClassVar[str]
    """Name of a spec to start from, for error messages."""
    texts: ClassVar[tuple[str, ...]]
    """Fields that are no figures."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Figures of what some devices lack: 0 there."""

    name: str
    efficiency: Mapping[str, float]
    sources: Mapping[str, str]

    @classmethod
    def number_names(cls) -> tuple[str, ...]:
        """The fields that hold one positive number."""
        names = (f.name for f in fields(cls))  # type: ignore[arg-type]
        return tuple(name for name in names if name not in (*cls.texts, "efficiency", "sources"))

    def check(self) -> None:
        """Raises `OptionError` if a figure is no positive finite number; copies the mappings."""
        for key, value in self._values().items():
            if isinstance(value, Mapping):
                object.__setattr__(self, key, dict(value))
        if not isinstance(self.efficiency, Mapping):
            raise TypeError(f"efficiency {self.efficiency!r}, not a table")
        for name in (*self.number_names(), "efficiency"):
            found = getattr(self, name)
            for value in found.values() if isinstance(found, Mapping) else (found,):
                ok = isinstance(value, int | float) and not isinstance(value, bool)
                absent = name in self.optional and value == 0
                if not ok or not (0 < value < float("inf") or absent):
                    raise OptionError(
                        f"{type(self).__name__}({self.name!r})",
                        f"{name} to be a positive number",
                        repr(value),
                        f"Start from a named spec: devices.device({self.example!r}).with_figures(...).",
                    )

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """16 hex digits over every figure (not over the name or the sources)."""
        data = {key: value for key, value in self._values().items() if key not in ("name", "sources")}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    def with_figures(self: Spec, source: str, **figures: Any) -> Spec:
        """The same device with some figures replaced; `efficiency` is merged, `source` says whence."""
        fractions = figures.pop("efficiency", {})
        efficiency = {**self.efficiency, **fractions}
        names = (*figures, *(f"efficiency {name}" for name in fractions))
        sources = {**self.sources, **dict.fromkeys(names, source)}
        return replace(self, efficiency=efficiency, sources=sources, **figures)  # type: ignore[type-var]

    def to_json(self) -> dict[str, Any]:
        values = self._values().items()
        data = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values}
        return {"type": self.type, **data}

    @classmethod
    def from_json(cls: builtins.type[Spec], data: Any) -> Spec:
        """Raises `OptionError` on anything that `to_json` did not write."""
        try:
            values = dict(data)
            kind = values.pop("type", cls.type)
            if kind != cls.type:
                raise TypeError(f"a spec of type {kind!r}")
            return cls(**values)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, OptionError):
                raise
            raise OptionError(
                f"{cls.__name__}.from_json",
                f"every field of a {cls.__name__}",
                str(error),
                "Write it with to_json.",
            ) from error

    def _values(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
