"""The cache folder: round trips, and every way a file can be bad."""

from __future__ import annotations

import logging

import pytest

from blocksparse_compiler import disk_cache


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_round_trip(folder):
    assert disk_cache.load("test", ["a", 1]) is None
    path = disk_cache.store("test", ["a", 1], {"x": 0.5})
    assert path.parent == folder and list(folder.iterdir()) == [path]
    assert disk_cache.load("test", ["a", 1]) == {"x": 0.5}
    assert disk_cache.load("test", ["a", 2]) is None
    assert disk_cache.load("other", ["a", 1]) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"null"])
def test_a_corrupt_file_is_ignored_with_a_warning(caplog, content):
    path = disk_cache.store("test", "key", 1)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "blocksparse_compiler"):
        assert disk_cache.load("test", "key") is None
    assert path.name in caplog.text
    disk_cache.store("test", "key", 2)
    assert disk_cache.load("test", "key") == 2


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCKSPARSE_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert disk_cache.store("test", "key", 1) is None
    assert disk_cache.load("test", "key") is None


def test_default_folder(monkeypatch):
    monkeypatch.delenv("BLOCKSPARSE_CACHE_DIR")
    assert "blocksparse_compiler" in str(disk_cache.cache_dir())
