"""`ds io`: what its commands print, and that they leave nothing behind."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from ds_core.errors import OpError
from ds_ops.aio import measuring, tuning
from ds_ops.aio.command import app, parse_size
from ds_ops.aio.measuring import Record, Sample, Setting
from ds_ops.aio.section import AioSection


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_engines():
    assert "threads" in invoke("engines")
    assert json.loads(invoke("engines", "--json"))["threads"] is None


def test_bench_measures_every_engine_and_leaves_nothing(tmp_path):
    told = json.loads(
        invoke("bench", tmp_path, "--size", "4M", "--rounds", 1, "--no-fio", "--json")
    )
    assert told["size"] == 4 << 20
    assert {row["engine"] for row in told["rows"]} == set(tuning.usable_engines())
    assert all(row["read_gb_per_s"] > 0 and row["write_gb_per_s"] > 0 for row in told["rows"])
    assert list(tmp_path.iterdir()) == []


def test_bench_of_a_file_only_reads_it(tmp_path):
    path = tmp_path / "mine.bin"
    path.write_bytes(b"\x05" * (3 << 20))
    table = invoke("bench", path, "--engine", "threads", "--rounds", 1, "--no-fio", "--depth", 2)
    assert "read GB/s" in table
    assert "write" not in table
    assert path.read_bytes() == b"\x05" * (3 << 20)


@pytest.mark.skipif(not measuring.fio_engines(), reason="no fio")
def test_bench_beside_fio(tmp_path):
    told = json.loads(
        invoke("bench", tmp_path, "--engine", "threads", "--size", "4M", "--rounds", 1, "--json")
    )
    assert {row["engine"] for row in told["rows"]} >= {"threads", "fio libaio"}


def test_tune_prints_and_writes_the_section(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning.space, "__defaults__", ((1 << 18, 1 << 20), (2, 4)))
    output = tmp_path / "aio.json"
    text = invoke("tune", tmp_path, "--size", "4M", "--rounds", 2, "--output", output)
    assert '"block_size"' in text
    section = json.loads(output.read_text())["aio"]
    assert AioSection(**section).block_size in (1 << 18, 1 << 20)
    assert list(tmp_path.iterdir()) == [output]


def test_choice_is_the_least_in_flight_among_the_best():
    def record(block: int, depth: int, seconds: float) -> Record:
        setting = Setting("threads", block, depth)
        return Record(setting, 1, {"read": [Sample(seconds, 0.0), Sample(9.0, 0.0)]})

    ranked = [record(8192, 32, 1.0), record(4096, 8, 1.02), record(4096, 2, 1.1)]
    assert tuning.choose(ranked) is ranked[1]
    assert tuning.as_section(Setting("threads", 4096, 8))["aio"]["queue_depth"] == 8


def test_refused(tmp_path):
    with pytest.raises(OpError, match="neither a folder nor a file"):
        invoke("bench", tmp_path / "none")
    (tmp_path / "short.bin").write_bytes(b"x")
    with pytest.raises(OpError, match="shorter than one block"):
        invoke("bench", tmp_path / "short.bin")
    with pytest.raises(typer.BadParameter, match="expected a size"):
        parse_size("many")
    assert [parse_size(t) for t in ("4096", "64K", "8MiB", "1g")] == [4096, 65536, 8 << 20, 1 << 30]
