"""Monitor, FLOPS profiler, elasticity, and the other commands."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed import env_report
from deepspeed._errors import NotProvidedError
from deepspeed.commands import bench, elastic, io, nvme_tune
from deepspeed.elasticity import ElasticityError, compute_elastic_config, elasticity_enabled
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.profiling.flops_profiler import FlopsProfiler, get_model_profile, number_to_string
from ds_core.errors import DsError

ELASTIC = {"enabled": True, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4, 6]}


def test_figures_go_where_the_config_says(tmp_path):
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    monitor = MonitorMaster(get_monitor_config({"csv_monitor": section, "bf16": {}}))
    assert monitor.enabled
    monitor.write_events([("Train/loss", 0.5, 8), ("Train/loss", 0.25, 16)])
    monitor.close()
    (file,) = (tmp_path / "job").iterdir()
    assert file.read_text().split() == ["step,loss", "8,0.5", "16,0.25"]
    assert not MonitorMaster(get_monitor_config({})).enabled
    with pytest.raises(NotProvidedError, match="MonitorMaster"):
        deepspeed.monitor.monitor.csvMonitor({})


def test_the_profiler_counts_a_forward():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    profiler = FlopsProfiler(model)
    with pytest.raises(DsError, match=r"call start_profile\(\) first"):
        profiler.get_total_flops()
    profiler.start_profile()
    model(torch.ones(2, 8))
    profiler.stop_profile()
    macs = 2 * (8 * 16 + 16 * 4)
    assert (profiler.get_total_macs(), profiler.get_total_flops()) == (macs, 2 * macs)
    assert profiler.get_total_params() == 8 * 16 + 16 + 16 * 4 + 4
    assert profiler.get_total_duration() > 0
    assert "MACs" in profiler.get_total_macs(as_string=True)
    profiler.end_profile()
    found = get_model_profile(model, (2, 8), print_profile=False, as_string=False)
    assert found[:2] == (2 * macs, macs)


def test_the_profiler_writes_its_report(tmp_path, capsys):
    model = nn.Linear(2, 2)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    profiler.reset_profile()
    model(torch.ones(1, 2))
    profiler.print_model_profile(output_file=str(tmp_path / "report.txt"))
    assert "Linear" in (tmp_path / "report.txt").read_text()
    profiler.print_model_aggregated_profile()
    assert "MACs" in capsys.readouterr().out
    assert number_to_string(1234567) == "1.23 M"
    profiler.end_profile()  # or everything that this process computes from now on is counted
    with pytest.raises(DsError, match="units: got 'X'"):
        number_to_string(1, "X")


def test_an_elastic_config():
    config = {"elasticity": ELASTIC}
    assert elasticity_enabled(config)
    assert not elasticity_enabled({})
    batch, counts = compute_elastic_config(ds_config=config, target_deepspeed_version="0.19")
    assert (batch, len(counts)) == (1680, 32)
    assert compute_elastic_config(config, "0", 7, return_microbatch=True)[2] == 6
    assert compute_elastic_config(config, "0", return_microbatch=True)[2] is None
    with pytest.raises(ElasticityError, match="does not suit 11 GPUs"):
        compute_elastic_config(config, "0", world_size=11)
    with pytest.raises(ElasticityError, match="no section"):
        compute_elastic_config({}, "0")
    with pytest.raises(ElasticityError, match="expected true"):
        compute_elastic_config({"elasticity": {"enabled": False}}, "0")
    with pytest.raises(ElasticityError, match="micro_batch_sizes"):
        compute_elastic_config({"elasticity": {**ELASTIC, "micro_batch_sizes": "x"}}, "0")


def test_flags_of_ds_elastic():
    assert elastic.words_of(["-c", "c.json"]) == ["elastic", "c.json"]
    assert elastic.words_of(["--config=c", "-w", "4"])[2:] == ["--world-size", "4"]


def test_flags_of_ds_io():
    words = io.words_of(
        ["--folder", "/data", "--io_size", "64M", "--read", "--engine", "aio_basic"]
    )
    assert words == [
        *("io", "bench", "/data", "--size", "64M", "--block", "1M", "--depth", "32"),
        *("--rounds", "3"),
    ]
    mapped = io.words_of(["--io_size=1M", "--folder_to_device_mapping", "/a:0", "/b:1", "--gpu"])
    assert mapped[2] == "/a"
    with pytest.raises(NotProvidedError, match="GPUDirect"):
        io.words_of(["--io_size=1M", "--use_gds"])


def test_flags_of_ds_nvme_tune(tmp_path):
    words = nvme_tune.words_of(["--nvme_dir", "/a", "/b", "--log_dir", str(tmp_path)])
    assert words[:5] == ["io", "tune", "/a", "--size", "400M"]
    assert words[-2:] == ["--output", str(tmp_path / "aio.json")]
    with pytest.raises(NotProvidedError, match="GPUDirect"):
        nvme_tune.words_of(["--nvme_dir", "/a", "--gds"])


def test_flags_of_ds_bench():
    words = bench.words_of(["--all-reduce", "--pt2pt", "--maxsize", "4", "--scan", "--raw"])
    assert words[words.index("--op") :] == [
        *("--op", "all_reduce", "--op", "exchange", "--dtype", "float"),
        *("--max-elements", "16", "--bits", "--json"),
    ]
    assert "--only-largest" in bench.words_of(["--bw-unit", "GBps"])


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["elastic", "-c", "config.json", "-w", "4"], "train_micro_batch_size_per_gpu"),
        (
            ["bench", "--all-gather", "--maxsize", "6", "--trials", "1", "--warmups", "0"],
            "busbw Gb",
        ),
    ],
    ids=["elastic", "bench"],
)
def test_commands_run(tmp_path, command, told):
    (tmp_path / "config.json").write_text(
        '{"elasticity": {"enabled": true, "max_train_batch_size": 64, "micro_batch_sizes": [2]}}'
    )
    name, *flags = command
    code = f"from deepspeed.commands.{name} import main; main({flags!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert told in done.stdout


def test_the_report_can_be_shorter(capsys):
    env_report.cli_main(["--hide_operator_status", "--hide_errors_and_warnings"])
    out = capsys.readouterr().out
    assert "Versions" in out
    assert "Warnings" not in out
    assert "rms_norm" not in out
    env_report.cli_main([])
    assert "rms_norm" in capsys.readouterr().out
