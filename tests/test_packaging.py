"""What lands on a user's machine: the wheel's contents, the backend's entry point, the console script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"blocksparse_compiler": "blocksparse_compiler", "passes": "blocksparse_compiler/passes"}
SOURCES["codegen"] = "blocksparse_compiler/codegen"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's wheel, built from a copy so that the work tree stays as it is."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(out), str(tree)], check=True)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_source_file_as_a_subpackage(wheel: Path) -> None:
    expected = {
        f"{target}/{path.relative_to(ROOT / folder)}"
        for folder, target in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected - set(zipfile.ZipFile(wheel).namelist()) == set()


def test_wheel_puts_one_name_into_site_packages(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"blocksparse_compiler"}


def test_the_unpacked_wheel_imports_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import blocksparse_compiler.passes, blocksparse_compiler.codegen as c; print(c.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    # -S leaves out .pth files and with them the editable install; site-packages comes back by hand.
    site = f"import sys; sys.path += {[p for p in sys.path if p.endswith('site-packages')]!r}; "
    done = subprocess.run(
        [sys.executable, "-S", "-c", site + code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_dynamo_finds_the_backend_by_its_entry_point() -> None:
    (entry,) = entry_points(group="torch_dynamo_backends", name="blocksparse")
    assert callable(entry.load())


def test_dynamo_lists_the_backend_without_an_import() -> None:
    code = "import torch, sys; print('blocksparse' in torch._dynamo.list_backends(exclude_tags=())); "
    code += "print('blocksparse_compiler' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_console_script_is_installed() -> None:
    (entry,) = entry_points(group="console_scripts", name="blocksparse")
    assert callable(entry.load())
