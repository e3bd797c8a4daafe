"""`dump_dir`: the graph after each pass, the plan and the generated sources, as files."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from torch.fx import GraphModule

from .codegen import inductor_api
from .plan import Plan


class GraphDump:
    """Writes what happens to one graph into `folder/graph_<n>/`; does nothing without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = _fresh(folder, "graph") if folder else None
        self._step = itertools.count()

    def on_pass(self, name: str, gm: GraphModule, count: int) -> None:
        """Called after each pass with its match count."""
        if self._folder:
            text = f"# after {name}: {count or 'nothing'} changed\n" + gm.print_readable(print_output=False)
            (self._folder / f"{next(self._step)}_{name}.py").write_text(text)

    def plan(self, plan: Plan) -> None:
        if self._folder:
            plan.save(self._folder / "plan.json")
            (self._folder / "plan.txt").write_text(str(plan))

    @contextlib.contextmanager
    def sources(self) -> Iterator[None]:
        """Captures the code that Inductor generates meanwhile."""
        if not self._folder:
            yield
            return
        with inductor_api.capture_sources() as sources:
            yield
        for i, source in enumerate(sources):
            (self._folder / f"generated_{i}.py").write_text(source)


def _fresh(folder: Path, stem: str) -> Path:
    for i in itertools.count():
        path = folder / f"{stem}_{i}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")
