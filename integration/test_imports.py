"""Importing a package costs what `import torch` costs, and does nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODULES = ["ds_core", "ds_ops", "ds_zero", "deepspeed"]
MAX_SECONDS = 0.25
MAX_MODULES = 120


def _probe(module: str) -> dict[str, Any]:
    probe = Path(__file__).with_name("import_probe.py")
    command = [sys.executable, str(probe), module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=MODULES)
def probe(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"module": request.param} | _probe(request.param)


def test_import_adds_few_modules_to_torch(probe: dict[str, Any]) -> None:
    assert len(probe["modules"]) <= MAX_MODULES, probe["modules"]


def test_import_adds_little_time_to_torch(probe: dict[str, Any]) -> None:
    # The least of a few runs: other processes can only slow a run down.
    fastest = probe["seconds"]
    for _ in range(4):
        if fastest <= MAX_SECONDS:
            break
        fastest = min(fastest, _probe(probe["module"])["seconds"])

    assert fastest <= MAX_SECONDS


def test_import_reads_no_environment_variable(probe: dict[str, Any]) -> None:
    assert probe["environment"] == []


def test_import_starts_nothing(probe: dict[str, Any]) -> None:
    assert (probe["started"], probe["threads"], probe["process_group"]) == ([], 0, False)


def test_probe_sees_what_an_import_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
import os, subprocess, sys, threading
os.getenv("A"), "B" in os.environ, os.environ["HOME"]
threading.Thread(target=threading.Event().wait, daemon=True).start()
subprocess.run([sys.executable, "-c", ""])
"""
    (tmp_path / "busy.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    probe = _probe("busy")

    variables = [read.split(" by ")[0] for read in probe["environment"]]
    assert variables[:3] == ["A", "B", "HOME"]
    assert f"A by {tmp_path / 'busy.py'}:3" in probe["environment"]
    assert probe["threads"] == 1
    assert "subprocess.Popen" in probe["started"]


def test_probe_refuses_a_forbidden_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy.py").write_text("import rich\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    with pytest.raises(AssertionError, match="import of rich halted"):
        _probe("heavy")
