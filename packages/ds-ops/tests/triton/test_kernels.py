"""Configs, targets, sources and runs of kernels in Triton; needs neither Triton nor a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from ds_core import ops
from ds_core.errors import BuildError, OpError
from ds_ops import gpu_runs
from ds_ops.implementations import Triton
from ds_ops.tools import Tools
from ds_ops.triton_kernels import catalog, checked, targets
from ds_ops.triton_kernels.kernel import Config, Kernel, types
from ds_ops.triton_kernels.targets import TARGETS

CUDA = torch.device("cuda", 0)


def attention(q, k):
    """Stands for a kernel."""


KERNEL = Kernel(
    attention,
    (
        Config({"BLOCK": 64}, {"head": 64, "page": 16}, targets=("sm_90",)),
        Config({"BLOCK": 128}, {"head": 128}, warps=8, targets=("sm_90", "gfx942")),
    ),
    types({"*bf16": "q k"}, CAUSAL=True),
)


@pytest.fixture
def gpu(monkeypatch):
    """Gives the machine a GPU of some architecture."""

    def give(name):
        monkeypatch.setattr(targets, "architecture", lambda device_type, index=None: name)

    give("sm_90")
    return give


def test_the_first_config_that_covers_a_call_is_taken(gpu):
    assert KERNEL.config("op", CUDA, head=64, page=16).constants == {"BLOCK": 64}
    assert KERNEL.config("op", CUDA, head=64, page=32).constants == {"BLOCK": 128}
    gpu("gfx942")
    assert KERNEL.config("op", CUDA, head=8, page=1).warps == 8


def test_sizes_that_no_config_covers_are_refused_with_those_that_exist(gpu):
    with pytest.raises(OpError, match=r"paged: head 256, page 16: .* attention for sm_90") as told:
        KERNEL.config("paged", CUDA, head=256, page=16)
    assert "configs for head up to 64, page up to 16; head up to 128;" in str(told.value)
    assert "DS_OPS_IMPL=paged=reference" in str(told.value)
    gpu("sm_80")
    with pytest.raises(OpError, match="configs for other targets only"):
        KERNEL.config("paged", CUDA, head=1, page=1)


def test_types_are_by_name():
    assert KERNEL.types == {"q": "*bf16", "k": "*bf16", "CAUSAL": True}


@pytest.mark.parametrize(
    ("architecture", "target"),
    [("sm_80", "sm_80"), ("sm_89", "sm_80"), ("sm_90", "sm_90"), ("sm_103", "sm_100"),
     ("gfx942", "gfx942"), ("gfx950", "gfx942")],
)  # fmt: skip
def test_a_device_runs_the_configs_of_its_kind(gpu, architecture, target):
    gpu(architecture)
    assert targets.of_device(CUDA) is TARGETS[target]
    assert targets.unavailable("cuda") is None


def test_a_device_that_no_kernel_is_made_for_is_told(gpu):
    gpu("sm_75")
    assert "sm_89" in targets.unavailable("cuda")
    assert targets.unavailable("cuda").endswith("this is sm_75")
    with pytest.raises(OpError, match="no kernel in Triton is made for cuda:0"):
        targets.of_device(CUDA)


def test_kernels_are_for_gpus_where_triton_is(monkeypatch, gpu):
    name = "rms_norm"
    assert ops.available(name, "cpu")["triton"] == "for cuda only"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'ds-ops[triton]'" in Triton(name).unavailable("cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert Triton(name).unavailable("cuda") is None


def test_a_build_for_gpus_needs_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("90", "sm_90a", "compute_90"):
        with pytest.raises(BuildError, match=r"--arch sm_90: triton is not installed: pip install"):
            Tools().build([name], everything=False, into_package=False)


def test_in_the_interpreter_they_are_for_cpus_on_request(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel = Triton("rms_norm")
    assert (kernel.devices, kernel.priority) == (("cpu",), 1)
    assert targets.unavailable("cpu") is None


def test_nothing_imports_triton_before_a_kernel_is_used():
    told = """
import sys
import ds_ops
from ds_core import ops
from ds_ops.tools import Tools
ops.choose("rms_norm", "cpu"), Tools().kernels()
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", told], check=True)


def test_every_function_that_the_catalog_names_is_there():
    for where in catalog.OPS.values():
        module, _, function = where.partition(":")
        assert f"\ndef {function}(" in (catalog.FOLDER / f"{module}.py").read_text(), where


def test_a_digest_changes_with_what_a_file_imports(monkeypatch, tmp_path):
    files = {
        "norms": "from ds_ops.triton_kernels.kernel import launch\n",
        "kernel": "from ds_ops.triton_kernels import targets\n",
        "targets": "",
        "rope": "",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(catalog, "FOLDER", tmp_path)

    def digests():
        catalog.digest.cache_clear()
        return catalog.digest("norms"), catalog.digest("rope")

    before = digests()
    (tmp_path / "targets.py").write_text("# new\n")
    after = digests()
    catalog.digest.cache_clear()
    assert before[0] != after[0]
    assert before[1] == after[1]


RMS_NORM = gpu_runs.GpuKernel("rms_norm", "triton", "a1b2c3d4e5f6")


def test_a_run_on_a_gpu_counts_for_the_source_that_ran(tmp_path):
    def record(date, source):
        told = {"device": "NVIDIA H200", "date": date, "kernels": {RMS_NORM.key: source}}
        (tmp_path / f"NVIDIA_H200-{date}.json").write_text(json.dumps(told))

    assert gpu_runs.ran_on(RMS_NORM, gpu_runs.runs(tmp_path)) == "never run on a GPU"
    record("2026-01-01", "another")
    (tmp_path / "memory.json").write_text('{"peak": 1}')
    (tmp_path / "torn.json").write_text("{")
    told = gpu_runs.ran_on(RMS_NORM, gpu_runs.runs(tmp_path))
    assert told == (
        "never run on a GPU at this version; another one ran on NVIDIA H200, 2026-01-01"
    )
    record("2025-12-31", RMS_NORM.digest)
    assert gpu_runs.ran_on(RMS_NORM, gpu_runs.runs(tmp_path)) == "ran on NVIDIA H200, 2025-12-31"


def test_runs_of_a_day_are_added_to_one_file(tmp_path):
    rope = gpu_runs.GpuKernel("rope", "triton", "f6e5d4c3b2a1")
    first = gpu_runs.record([RMS_NORM], "NVIDIA H200", tmp_path)
    assert gpu_runs.add({"rows": [1]}, "NVIDIA H200", tmp_path) == first
    assert gpu_runs.record([rope], "NVIDIA H200", tmp_path) == first
    assert json.loads(first.read_text())["rows"] == [1]
    (found,) = gpu_runs.runs(tmp_path)
    assert found.kernels == {each.key: each.digest for each in (RMS_NORM, rope)}


def test_the_tools_tell_every_kernel():
    found = {(kernel.op, kernel.implementation): kernel for kernel in Tools().kernels()}
    assert {op for op, implementation in found if implementation == "triton"} == set(catalog.OPS)
    assert found["rms_norm", "triton"].source == catalog.digest("norms")
    assert found["sign_unpack", "cuda"].source
    assert all(kernel.ran for kernel in found.values())


def test_checks_without_a_gpu_count_for_the_source_that_they_saw(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_OPS_CACHE", str(tmp_path))
    assert checked.seen("rope") == ()
    checked.mark_interpreted("rope")
    checked.mark_compiled("rope", "gfx942")
    assert checked.seen("rope") == ("interpreted", "fits gfx942")
    assert checked.seen("rope_") == ("fits gfx942",)  # of the same file
    told = {(kernel.op, kernel.implementation): kernel.checks for kernel in Tools().kernels()}
    assert told["rope", "triton"] == ("interpreted", "fits gfx942")
    assert told["rms_norm", "triton"] == ()
    monkeypatch.setattr(catalog, "digest", lambda module: "changed")
    assert checked.seen("rope") == ()
