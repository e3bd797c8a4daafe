"""The README tells the truth: its examples run, its commands exist, its figures come from committed files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from benchmarks import readme

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_python_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 3
    namespace: dict[str, object] = {}
    for number, source in enumerate(BLOCKS):
        exec(compile(source, f"README.md, example {number}", "exec"), namespace)


def test_first_example_fits_on_a_screen() -> None:
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 15


def test_make_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", TEXT, re.MULTILINE))
    names = {a or b for a, b in named}
    assert {"demo", "test", "bench"} <= names <= targets


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_local_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert (folder / link).exists(), f"{page} links to {link}"


def test_measured_figures_are_those_of_the_committed_results() -> None:
    assert readme.fill(TEXT) == TEXT


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs" / "env_vars.md").read_text()
    folders = ("blocksparse_compiler", "passes", "codegen")
    sources = [p.read_text() for f in folders for p in (ROOT / f).rglob("*.py")]
    used = set(re.findall(r"""["'$](BLOCKSPARSE_[A-Z_]+)""", os.linesep.join(sources)))
    assert used == set(re.findall(r"`(BLOCKSPARSE_[A-Z_]+)`", page))
