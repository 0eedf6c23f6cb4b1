"""What ds-ops adds to `ds ops`."""

from __future__ import annotations

import json

import pytest
import torch

from ds_core.cli import main
from ds_core.errors import BuildError, OpError
from ds_core.seams import OpTools
from ds_ops.native import cache, library, sources
from ds_ops.tools import Tools


def test_it_satisfies_the_protocol():
    assert isinstance(Tools(), OpTools)


def test_facts_name_what_building_depends_on(compiler, cache_folder):
    facts = Tools().facts()
    assert facts["compiler"] == f"fake++ 1.0 ({compiler.path})"
    assert facts["cache"] == str(cache_folder)
    assert facts["sources"] == Tools().version()
    assert {"instruction set", "torch", "ninja", "triton", "io_uring", "lockable memory"} <= set(
        facts
    )


def test_facts_are_told_where_nothing_works(compiler, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("DS_OPS_CACHE", "/dev/null/cache")
    facts = Tools().facts()
    assert facts["compiler"].startswith("CXX=/nowhere/g++ is not found")
    assert facts["cache"].startswith("DS_OPS_CACHE=/dev/null/cache: Not a directory")


def test_a_build_says_what_it_made(compiler):
    (line,) = Tools().build([], everything=True, into_package=False)
    assert line.startswith(str(library.find()))
    assert "built in" in line
    assert Tools().build([sources.machine()], everything=False, into_package=False) == [line]
    assert compiler.count("link") == 1


def test_a_library_in_the_package_comes_first_and_is_alone_there(compiler):
    old = cache.PREBUILT / "old"
    old.mkdir(parents=True)
    Tools().build([], everything=False, into_package=True)
    assert library.state() == "prebuilt"
    assert [path.name for path in cache.PREBUILT.iterdir()] == [library.find().parent.name]
    assert {path.name for path in library.find().parent.iterdir()} == {cache.LIBRARY, cache.META}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sm_70", "no kernels are made for it; expected sm_80, sm_90, sm_100, gfx942, or"),
        ("gfx1100", "no kernels are made for it"),
        ("riscv64", "build for riscv64 on such a machine; GPUs are sm_80"),
    ],
)
def test_other_architectures_are_refused(compiler, name, message):
    with pytest.raises(BuildError, match=message):
        Tools().build([name], everything=False, into_package=False)


def test_without_a_compiler_a_build_is_an_error(compiler, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"ds ops build: no C\+\+ compiler"):
        Tools().build([], everything=False, into_package=False)


def test_families_of_benchmarks_are_the_modules_that_have_rows():
    assert "build" in Tools().benchmarks()
    assert not {"timing", "floors"} & set(Tools().benchmarks())
    with pytest.raises(OpError, match=r"no benchmarks none; there are .*build"):
        Tools().bench(["none"], seconds=0.0, only="", as_json=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_for_gpus_are_measured_where_there_is_one():
    assert "gpu" not in Tools().benchmarks()
    assert Tools().unmeasured() == {"gpu": "torch finds no GPU here"}
    with pytest.raises(OpError, match="ds ops bench gpu: torch finds no GPU here"):
        Tools().bench(["gpu"], seconds=0.0, only="", as_json=True)


def test_the_report_tells_a_compiler_that_fails_from_one_that_is_absent(
    compiler, monkeypatch, capsys
):
    def report():
        with pytest.raises(SystemExit) as ended:
            main(["ops", "report", "--json"])
        assert not ended.value.code
        found = json.loads(capsys.readouterr().out)
        return next(row for row in found["rows"] if row["op"] == "rms_norm"), found["advice"]

    row, advice = report()
    assert (row["implementation"], row["state"]) == ("cpp", "will build")
    assert "`ds ops build` does it now" in advice[0]
    monkeypatch.setenv("CXX", "/nowhere/g++")
    row, advice = report()
    assert (row["implementation"], row["state"]) == ("cpp", "cannot build")
    assert "CXX=/nowhere/g++ is not found" in advice[0]
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    row, advice = report()
    assert (row["implementation"], row["state"]) == ("reference", "python")
    assert "no C++ compiler" in row["unavailable"]["cpp"]
    assert "Slower than it could be: cpp on cpu: no C++ compiler" in advice[0]
