"""Building once, whoever asks, whatever dies, and errors that say what to do."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time

import pytest
from native_processes import start

from ds_core.errors import BuildError
from ds_ops.native import build, cache, library, sources

ENSURE = "from ds_ops.native import library; print(library.ensure())"


def test_many_processes_build_once(compiler, cache_folder):
    compiler.behave(seconds=0.1)
    processes = [start(ENSURE) for _ in range(4)]
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, ended
    (path,) = {out.strip() for out, _ in ended}
    assert path.startswith(str(cache_folder))
    assert compiler.count("link") == 1
    assert compiler.count("compile") == len(sources.units())


def test_a_killed_builder_leaves_nothing_that_is_loaded(compiler, cache_folder):
    compiler.behave(seconds=40)
    process = start(ENSURE)
    deadline = time.monotonic() + 120
    while compiler.count("compile") == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert library.find() is None
    assert list(cache_folder.glob("*.tmp-*"))
    compiler.behave()
    begin = time.monotonic()
    assert cache.is_whole(library.ensure())
    assert time.monotonic() - begin < 30, "waited for what the killed one left running"
    assert not list(cache_folder.glob("*.tmp-*"))


def test_what_is_built_is_found_again(compiler, cache_folder, digest):
    assert library.state() == "will build"
    assert library.unavailable() is None
    first = library.ensure()
    assert library.find() == first == library.ensure()
    assert library.state() == "cached"
    assert compiler.count("link") == 1
    meta = json.loads((first.parent / cache.META).read_text())
    assert meta["sources"] == digest
    assert meta["compiler"] == "fake++ 1.0"
    assert {path.name for path in first.parent.iterdir()} == {cache.LIBRARY, cache.META}


def test_another_version_of_the_compiler_builds_anew(compiler):
    first = library.ensure()
    compiler.behave(version="fake++ 2.0")
    assert library.state() == "will build"
    assert library.ensure() != first
    compiler.behave()
    assert library.find() == first


def test_other_sources_build_anew(compiler, monkeypatch):
    first = library.ensure()
    monkeypatch.setattr(sources, "digest", lambda: "other")
    assert library.find() is None
    assert library.ensure() != first


@pytest.mark.parametrize("keeps_size", [True, False], ids=["flipped", "truncated"])
def test_a_damaged_library_is_built_anew(compiler, caplog, keeps_size):
    path = library.ensure()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if keeps_size else content[:1000])
    assert cache.is_whole(library.ensure())
    assert compiler.count("link") == 2
    assert ("is not as it was built, and is built anew" in caplog.text) is keeps_size


def test_a_prebuilt_library_wins_if_its_sources_match(compiler, monkeypatch):
    cached = library.ensure()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    cache.PREBUILT.mkdir()
    os.rename(cached.parent, cache.PREBUILT / cached.parent.name)
    assert library.find().parent.parent == cache.PREBUILT
    assert library.state() == "prebuilt"
    assert library.unavailable() is None
    monkeypatch.setattr(sources, "digest", lambda: "edited")
    assert library.find() is None
    assert "no C++ compiler" in library.unavailable()


def test_without_a_compiler_any_cached_library_serves(compiler, monkeypatch):
    cached = library.ensure()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert library.find() == cached
    assert library.unavailable() is None


def test_a_failing_compiler_is_an_error_with_all_that_helps(compiler, cache_folder):
    compiler.behave(error="norms.cpp:1: error: no such thing")
    with pytest.raises(BuildError) as raised:
        library.ensure()
    told = str(raised.value)
    assert f"did not build with fake++ 1.0 ({compiler.path})" in told
    assert "norms.cpp:1: error: no such thing" in told
    assert f"{compiler.path} -std=c++20" in told  # the command
    (log,) = cache_folder.glob("*.log")
    assert f"whole output: {log}" in told
    assert "no such thing" in log.read_text()
    assert "set CXX to another" in told
    assert "DS_OPS_IMPL='*=reference'" in told
    assert len(told.splitlines()) <= 45
    assert library.find() is None
    assert not list(cache_folder.glob("*.tmp-*"))


def test_a_failure_is_told_again_without_another_build(compiler, monkeypatch):
    compiler.behave(error="broken")
    library._outcome.cache_clear()
    try:
        for _ in range(3):
            with pytest.raises(BuildError, match="did not build"):
                library.load()
        tried = compiler.count("compile")
        assert tried <= len(sources.units())
        with pytest.raises(BuildError, match="did not build"):
            library.bind("rms_norm", "ds_ops", "CPU")
        assert compiler.count("compile") == tried
    finally:
        library._outcome.cache_clear()


def test_waiting_for_a_lock_ends_and_names_its_holder(compiler, cache_folder, monkeypatch):
    monkeypatch.setenv("DS_OPS_BUILD_TIMEOUT", "0.2")
    path = cache.root() / f"{cache.key(sources.digest(), 'fake++ 1.0')}.lock"
    with open(path, "w") as held:
        held.write("process 123 on node7")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match=r"held by process 123 on node7.*DS_OPS_BUILD_TIMEOUT"):
            library.ensure()
    assert cache.is_whole(library.ensure())


def test_a_lock_file_that_a_dead_process_left_holds_nobody_up(compiler):
    path = cache.root() / f"{cache.key(sources.digest(), 'fake++ 1.0')}.lock"
    path.write_text("process 1 on a node that is gone")
    assert cache.is_whole(library.ensure())


def test_a_full_disk_is_an_error_that_names_the_folder(compiler, cache_folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.tempfile, "mkdtemp", full)
    with pytest.raises(BuildError, match=f"built in {cache_folder}.*No space left.*DS_OPS_CACHE"):
        library.ensure()


def test_a_bad_timeout_is_refused(compiler, monkeypatch):
    monkeypatch.setenv("DS_OPS_BUILD_TIMEOUT", "soon")
    with pytest.raises(BuildError, match=r"DS_OPS_BUILD_TIMEOUT='soon'.*expected seconds"):
        library.ensure()


def test_a_library_that_does_not_load_says_how_to_mend_it(tmp_path):
    path = tmp_path / "key" / cache.LIBRARY
    path.parent.mkdir()
    path.write_text("not a library" * 100)
    with pytest.raises(BuildError, match=r"do not load: .*invalid ELF header.*delete .*key"):
        library._open(path)
