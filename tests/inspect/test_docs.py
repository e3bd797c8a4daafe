"""The examples of docs/explain.md and docs/gpu_kernels.md run, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "explain.md"


def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    assert len(blocks) > 5
    assert "lines of C++" in capsys.readouterr().out
    assert (tmp_path / "explanation.html").is_file()


def test_examples_about_gpu_kernels_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.chdir(tmp_path)
    page = PAGE.with_name("gpu_kernels.md")
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)
    assert "@triton.jit" in capsys.readouterr().out
    assert namespace["kernel"].ops == ("blocksparse.conv.default", "aten.relu.default")
    assert {path.name for path in (tmp_path / "kernels").iterdir()} == {
        "README.txt", "plan.json", "resources.json", "program.py", "kernels",
    }  # fmt: skip


def test_reasons_in_the_page_are_the_ones_in_the_code():
    """Each row of the table of reasons quotes a sentence that a plan can give."""
    root = PAGE.parents[1]
    files = root / "blocksparse_compiler" / "cost.py", root / "passes" / "quantized_calls.py"
    code = "".join(path.read_text() for path in files)
    table = PAGE.read_text(encoding="utf-8").partition("| reason |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", table, re.MULTILINE)
    sentences = [
        row for row in rows if row not in ("reason", "---", "no kernel for …") and not row[0].isdigit()
    ]
    assert len(sentences) == 7
    for sentence in sentences:
        assert sentence.removeprefix("the tiles ").removeprefix("dequantized, as ") in code, sentence
