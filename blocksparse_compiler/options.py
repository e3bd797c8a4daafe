"""Options of the backend: ours, checked; everything else, Inductor's."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .codegen.inductor_api import inductor_option_names
from .errors import OptionError
from .pattern import BlockShape, check_block_shape
from .plan import Plan

WHERE = 'torch.compile(backend="blocksparse", options=…)'


@dataclass(frozen=True)
class BackendOptions:
    """What `options={...}` may hold besides Inductor's own configuration.

    Args:
        plan: a `Plan` (or the path of a saved one) to obey for the layers it names.
        autotune: measure the best few candidates, dense included, instead of trusting the cost model.
        dense: "auto" keeps a layer dense where that is estimated faster; "never" forces a kernel
            wherever one exists.
        block_shape: consider only this tile shape.
        dump_dir: folder for the graph after each pass, the plan and the generated sources.
        guard: how weights are watched for changes that torch does not count, such as writes through
            `.data`. "sample" compares a few elements of every tensor on each call and a slice of all
            contents in turn (on a GPU asynchronously, so that such a change shows after some calls); "full"
            compares everything on each call (and waits for the GPU); "version" trusts torch's counters.
        inductor: options passed through to Inductor.
    """

    plan: Plan | None = None
    autotune: bool = False
    dense: str = "auto"
    block_shape: BlockShape | None = None
    dump_dir: Path | None = None
    guard: str = "sample"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("dense", self.dense, ("auto", "never"))
        _one_of("guard", self.guard, ("sample", "full", "version"))
        if not isinstance(self.autotune, bool):
            raise OptionError(WHERE, "autotune to be True or False", repr(self.autotune), "")
        if self.block_shape is not None:
            object.__setattr__(self, "block_shape", check_block_shape(self.block_shape, WHERE))
        if self.plan is not None and not isinstance(self.plan, Plan):
            object.__setattr__(self, "plan", _load_plan(self.plan))
        if self.dump_dir is not None:
            object.__setattr__(self, "dump_dir", Path(self.dump_dir))

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> BackendOptions:
        """Splits a user's dict. Raises `OptionError` that lists the valid names on an unknown one."""
        ours = {f.name for f in fields(cls)} - {"inductor"}
        mine = {key: value for key, value in (options or {}).items() if key in ours}
        rest = {key.replace("-", "_"): v for key, v in (options or {}).items() if key not in ours}
        known = inductor_option_names()
        for key in rest:
            if key not in known:
                close = difflib.get_close_matches(key, [*ours, *known], n=1)
                hint = f"Did you mean {close[0]!r}? " if close else ""
                raise OptionError(
                    WHERE,
                    f"one of {', '.join(sorted(ours))}, or an option of torch._inductor",
                    repr(key),
                    f"{hint}Inductor's are listed by torch._inductor.list_options().",
                )
        return cls(**mine, inductor=rest)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(WHERE, f"{name} to be one of {', '.join(allowed)}", repr(value), "")


def _load_plan(source: Any) -> Plan:
    if isinstance(source, str | Path):
        return Plan.load(source)
    raise OptionError(
        WHERE, "plan to be a Plan or the path of a saved one", type(source).__name__, "See Plan.save."
    )
