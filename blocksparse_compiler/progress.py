"""A line on the terminal for work that takes more than a moment."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PATIENCE_SECONDS = 2.0


class ProgressLine:
    """What is being done, and how far it is. Thread-safe; silent until `start` shows it."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("blocksparse", total=None)

    def start(self) -> None:
        self._bar.start()

    def stop(self) -> None:
        if self._bar.live.is_started:  # else rich prints an empty line into files and pipes
            self._bar.stop()

    def update(self, what: str, done: int | None = None, total: int | None = None) -> None:
        """Says what is going on; with `done` and `total`, how far."""
        self._bar.update(self._task, description=f"blocksparse: {what}", completed=done or 0, total=total)


@contextlib.contextmanager
def progress_line() -> Iterator[ProgressLine]:
    """A `ProgressLine` that appears on a terminal once the work has taken `PATIENCE_SECONDS`."""
    line = ProgressLine()
    timer = threading.Timer(PATIENCE_SECONDS, line.start)
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield line
    finally:
        timer.cancel()
        line.stop()
