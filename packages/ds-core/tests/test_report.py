"""`ds report`: what it finds, and that nothing it finds can break it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from importlib.metadata import EntryPoint

import pytest
import torch

from ds_core import __version__, _env, plugins
from ds_core.cli import installed, machine, main, offload_report
from ds_core.cli.installed import Installable, Provided, installable, provided
from ds_core.cli.machine import Device, examine
from ds_core.cli.ops_report import OpRow, op_rows
from ds_core.cli.report_warnings import warnings_of
from ds_core.cli.reporting import collect, render
from ds_core.errors import PluginError
from ds_core.ops import registry


@pytest.fixture
def report(capsys):
    """Runs `ds report` in this process and returns what it printed."""

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main(["report", *words])
        assert not ended.value.code
        # How wide a column is depends on what is installed.
        return re.sub(" +", " ", capsys.readouterr().out)

    return run


def test_the_report_shows_versions_devices_and_providers(report):
    shown = report()
    for words in ("python", "torch", "devices", "gloo", f"ds-core {__version__}", "/dev/shm"):
        assert words in shown
    for title in ("Versions", "Machine", "Packages", "Provided by packages", "Ops"):
        assert f"{title}\n" in shown


def test_the_report_as_json_has_the_same_facts(report):
    found = json.loads(report("--json"))
    assert found["installed"]["ds-core"] == __version__
    assert found["backends"]["gloo"] is True
    assert found["machine"]["cores"] >= 1
    assert {"rms_norm"} <= {row["op"] for row in found["ops"]}
    assert not {row["name"] for row in found["installable"]} & set(found["installed"])


def entries(monkeypatch, seam, **targets):
    """Pretend that packages register these on a seam."""
    made = [EntryPoint(name, value, f"ds_core.{seam}") for name, value in targets.items()]
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: made if group == f"ds_core.{seam}" else []
    )


def test_a_broken_entry_point_is_reported(report, monkeypatch):
    entries(monkeypatch, "transports", torn="no_such_module:Transport", good="json:dumps")
    shown = report()
    assert "transports: good json:dumps" in shown
    assert "transports: torn no_such_module:Transport broken" in shown
    assert "does not load: No module named 'no_such_module'" in shown.split("Warnings")[1]


def test_two_packages_that_claim_one_name_are_reported(monkeypatch):
    one = EntryPoint("zero", "a:b", "ds_core.sharding")
    other = EntryPoint("zero", "c:d", "ds_core.sharding")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [one, other])
    (row, *_) = [row for row in provided() if row.seam == "sharding"]
    assert "both an unnamed distribution (a:b) and" in row.problem


class Fused:
    op, name, priority, devices = "rms_norm", "fused", 100, ()

    def unavailable(self, device_type):
        return "no compiler"

    def state(self, device_type):
        raise AssertionError("of one that cannot run")

    def partly(self):
        return None

    def traced(self):
        return None

    def bind(self, namespace, device_type):
        raise AssertionError("a report computes nothing")


def implementations():
    return [Fused()]


@pytest.fixture
def op_package(monkeypatch):
    """Pretends that one package registers this for ops."""

    def register(target):
        monkeypatch.setitem(sys.modules, "a_pillar", sys.modules[__name__])
        entries(monkeypatch, "ops", ours=target)
        registry._installed.cache_clear()

    yield register
    registry._installed.cache_clear()


def test_ops_say_who_computes_them_and_why_not(report, op_package):
    op_package("a_pillar:implementations")
    shown = report()
    assert "Slower than it could be: fused on cpu: no compiler" in shown
    assert re.search(r"reference on cpu python: \d+ ops", shown)


def test_without_kernels_the_report_says_what_to_install(report, op_package):
    op_package("a_pillar:list")
    sys.modules[__name__].list = list
    try:
        assert "For fast kernels: pip install ds-ops" in report()
    finally:
        del sys.modules[__name__].list


def test_a_broken_op_package_is_reported(report, op_package):
    op_package("no_such_module:ops")
    (row,) = op_rows()
    assert "no_such_module" in row.problem
    assert "ops: ds_core.ops: 'ours' of" in report().split("Warnings")[1]


def test_what_could_be_installed_comes_with_its_command(monkeypatch):
    versions = {"ds-core": "0.1.0", "ds-zero": "0.1.0", "tensorboard": None}
    monkeypatch.setattr(installed, "version_of", versions.get)
    needs = {"ds-core": ['tensorboard>=2.17; extra == "tensorboard"', 'pytest; extra == "test"']}
    monkeypatch.setattr(installed.metadata, "requires", lambda name: needs.get(name, []))
    found = installable()
    assert Installable("ds-moe", "mixture of experts", "pip install ds-moe") in found
    extra = Installable("ds-core[tensorboard]", "tensorboard", 'pip install "ds-core[tensorboard]"')
    assert extra in found
    assert not any("test]" in row.name or row.name == "ds-zero" for row in found)


@pytest.mark.parametrize(
    ("version", "rules", "holds"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("0.1.7", ">=0.1,<0.2", True),
        ("0.2.0", ">=0.1,<0.2", False),
        ("0.3.5", "~=0.3.1", True),
        ("0.4.0", "~=0.3.1", False),
        ("1.0", "!=1.0", False),
    ],
)
def test_ranges_of_versions_are_read(version, rules, holds):
    assert installed._satisfies(version, rules) is holds


def test_a_version_out_of_range_is_warned_of(monkeypatch):
    versions = {"ds-core": "0.1.0", "ds-zero": "0.1.0", "numpy": "2.0"}
    monkeypatch.setattr(installed, "version_of", versions.get)
    needs = {"ds-core": ["torch>=99", "numpy>=1"], "ds-zero": ["ds-core<0.2,>=0.1", "absent>=1"]}
    monkeypatch.setattr(installed.metadata, "requires", lambda name: needs.get(name, []))
    torch_problem, absent_problem = installed.range_problems()
    assert torch_problem.startswith(f"ds-core needs torch >=99, {torch.__version__} is installed")
    assert absent_problem.startswith("ds-zero needs absent >=1, which is not installed: pip insta")


def warned(environment=None, **changes):
    found = dataclasses.replace(examine(), open_files=65536, shm_bytes=8 << 30)
    return warnings_of(dataclasses.replace(found, **changes), [], [], environment or {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shm_bytes": 64 << 20}, "/dev/shm has 64 MiB.*--shm-size=8g"),
        ({"open_files": 1024}, "a process may open 1024 files"),
        (
            {"device_kind": "cuda", "devices": (), "locked_bytes": 64 << 10},
            "a process may lock 64 KiB",
        ),
    ],
    ids=["shm", "files", "locked"],
)
def test_limits_that_hurt_are_warned_of(changes, message):
    assert warned() == []
    (told,) = warned(**changes)
    assert re.match(message, told)


def test_a_torch_for_gpus_without_one_is_warned_of(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "sees none: no driver, no device" in warned(device_kind="cpu")[0]
    (told,) = warned({"CUDA_VISIBLE_DEVICES": ""}, device_kind="cpu")
    assert "sees none: CUDA_VISIBLE_DEVICES='' hides them" in told


def test_a_gpu_that_torch_is_not_built_for_is_warned_of(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    card = Device(0, "Card", 1 << 30, "sm_120")
    old = Device(0, "Old", 1 << 30, "sm_86")
    (told,) = warned(device_kind="cuda", devices=(card, old), locked_bytes=-1)
    assert told.startswith("Card is sm_120, torch is built for sm_80, sm_90")


def test_broken_packages_are_warned_of_once():
    rows = [Provided("ops", "x", "ds-x 1", "torn"), Provided("ops", "y", "ds-x 1", "torn")]
    ops = [OpRow("*", "*", problem="torn"), OpRow("*", "*", problem="torn")]
    assert warnings_of(examine(), rows, ops, {})[-2:] == ["ds-x 1: torn", "ops: torn"]


def test_variables_of_effect_are_shown_and_secrets_are_not(monkeypatch):
    variables = {
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "DS_TOKEN": "secret",
        "HOME": "/home/user",
    }
    monkeypatch.setattr(_env, "whole", lambda: variables)
    found = collect()
    assert found.environment == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"}
    assert "secret" not in render(found) + found.as_json()


def test_who_steps_on_the_host_and_who_moves_tensors_to_disk_is_told(monkeypatch):
    rows = {row.what: row for row in offload_report.offload_rows()}
    assert set(rows) == {f"{name} on the host" for name in offload_report._TYPES} | {"tensor files"}
    shown = render(collect())
    assert all(row.chosen in shown for row in rows.values())
    monkeypatch.setattr(plugins, "registered", lambda seam: {})
    bare = {row.what: row for row in offload_report.offload_rows()}
    adam, files = bare["AdamW on the host"], bare["tensor files"]
    assert adam.chosen == "torch AdamW"
    assert adam.reason == "fused; pip install ds-ops for C++ kernels"
    assert "threads" in files.chosen
    assert "pip install ds-ops" in files.reason


def test_an_engine_of_files_that_does_not_open_is_told(monkeypatch):
    def broken():
        raise PluginError("it does not load")

    monkeypatch.setattr(offload_report, "open_tensor_files", broken)
    row = offload_report.offload_rows()[-1]
    assert (row.chosen, row.reason) == ("none", "it does not load")


def test_devices_have_a_row_each(monkeypatch):
    card = Device(0, "NVIDIA H100", 80 << 30, "sm_90")
    found = dataclasses.replace(examine(), device_kind="cuda", devices=(card,))
    monkeypatch.setattr("ds_core.cli.reporting.examine", lambda: found)
    assert re.search(r"cuda:0 +NVIDIA H100, 80\.0 GiB, sm_90", render(collect()))


def test_a_machine_without_linux_files_is_examined(monkeypatch):
    monkeypatch.setattr(machine, "_text", lambda path: "")
    monkeypatch.setattr(machine, "SHARED_MEMORY", machine.Path("/nowhere"))
    found = examine()
    assert (found.memory_bytes, found.shm_bytes, found.isa) == (None, None, ())
    assert found.processor


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_the_report_fits_a_terminal_of_80_columns():
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "ds_core.cli", "report"]
    process = subprocess.Popen(
        command, stdout=child, stderr=child, env={**os.environ, "NO_COLOR": "1"}
    )
    os.close(child)
    shown = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # the other end was closed
            break
        if not piece:
            break
        shown += piece
    os.close(parent)
    assert process.wait() == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()
    assert "Machine" in lines
    assert max(map(len, lines)) <= 80


def test_the_report_says_where_packages_are_and_what_builds_kernels(report):
    found = json.loads(report("--json"))
    assert found["places"]["torch"] == os.path.dirname(torch.__file__)
    assert found["places"]["ds-core"].endswith("ds_core")
    if "ds-ops" in found["installed"]:
        assert "compiler" in found["build_tools"]


def test_the_cuda_compiler_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert machine.cuda_compiler() is None
    program = tmp_path / "nvcc"
    program.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.6, V12.6.20'\n")
    program.chmod(0o755)
    assert machine.cuda_compiler() == f"12.6 ({program})"


def test_two_versions_of_a_package_in_one_folder_hurt(tmp_path, monkeypatch):
    for name, version in (("deepspeed", "0.19.8"), ("deepspeed", "0.19.8+ds.0.1.0"), ("x", "1")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    (told,) = [text for text in installed.duplicates() if str(tmp_path) in text]
    assert "2 versions of deepspeed (0.19.8, 0.19.8+ds.0.1.0)" in told
