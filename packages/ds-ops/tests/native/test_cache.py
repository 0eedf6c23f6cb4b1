"""Where libraries are kept when the usual place cannot be written."""

from __future__ import annotations

import pytest

from ds_core.errors import BuildError
from ds_ops.native import cache, library


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home that is a file, so that nothing can be made in it, even by root."""
    (tmp_path / "home").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.delenv("DS_OPS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    return tmp_path


def test_a_users_cache_is_the_usual_place(monkeypatch, tmp_path):
    monkeypatch.delenv("DS_OPS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.root() == tmp_path / "ds_ops"
    assert cache.root().stat().st_mode & 0o077 == 0


def test_a_home_that_cannot_be_written_moves_the_cache(home, caplog):
    root = cache.root()
    assert root.parent == home / "temporary"
    assert cache.root() == root
    assert caplog.text.count("built libraries are kept in") == 1
    assert cache.readable()[-1] == root


def test_a_temporary_folder_that_others_can_write_is_not_trusted(home):
    root = cache.root()
    cache._root.cache_clear()
    root.chmod(0o777)
    assert root not in cache.readable()
    with pytest.raises(BuildError, match="set DS_OPS_CACHE to a folder that can be written"):
        cache.root()


def test_a_cache_that_is_named_and_cannot_be_written_is_an_error(compiler, home, monkeypatch):
    monkeypatch.setenv("DS_OPS_CACHE", str(home / "home" / "cache"))
    assert library.unavailable() is None
    with pytest.raises(BuildError, match=r"DS_OPS_CACHE=.*Not a directory; name a folder"):
        library.ensure()


def test_a_read_only_cache_serves_what_it_holds(compiler, monkeypatch):
    built = library.ensure()
    cache._root.cache_clear()
    monkeypatch.setattr(cache, "_unwritable", lambda folder: "Read-only file system")
    assert library.ensure() == built
    with pytest.raises(BuildError, match="Read-only file system"):
        cache.root()
    cache._root.cache_clear()


def test_what_is_no_library_is_not_found(tmp_path):
    for name, text in (("a", None), ("b", "{"), ("c", "[]"), ("d", '{"sources": "x", "bytes": 1}')):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / cache.META).write_text(text)
    assert cache.built(tmp_path, "x") is None
    assert cache.built(tmp_path / "nowhere", "x") is None
