"""A compiler for tests, with an empty cache, and the library that the real one built."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from native_processes import FakeCompiler

from ds_ops.native import library, sources, toolchain


@pytest.fixture(scope="session")
def real_library():
    """The library of this tree, built by the real compiler."""
    reason = library.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return library.ensure()


@pytest.fixture
def compiler(tmp_path, monkeypatch, real_library):
    """A fake compiler, named by CXX, with an empty cache, and nothing prebuilt."""
    fake = FakeCompiler(tmp_path / "compiler", real_library)
    monkeypatch.setenv("CXX", str(fake.path))
    monkeypatch.setenv("DS_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library.cache, "PREBUILT", tmp_path / "prebuilt")
    yield fake
    toolchain._examine.cache_clear()


@pytest.fixture
def cache_folder(tmp_path):
    """The empty cache of `compiler`."""
    return tmp_path / "cache"


@pytest.fixture
def digest():
    """Of this tree's sources."""
    return sources.digest()
