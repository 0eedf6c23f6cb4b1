"""Whose `import deepspeed` is, and whose the metadata says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ds_core.cli import dropin
from ds_core.cli.app import make_app
from ds_core.cli.report_warnings import dropin_problems as told_by_report

OURS = '__provider__ = "ds"\n'
THEIRS = "import torch\n"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the whole path, so that only what a test writes is installed."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    return tmp_path


def install(folder: Path, version: str, code: str | None) -> None:
    metadata = folder / f"deepspeed-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n")
    if code is not None:
        (folder / "deepspeed").mkdir(exist_ok=True)
        (folder / "deepspeed" / "__init__.py").write_text(code)


@pytest.mark.parametrize(
    ("version", "code"), [("0.19.8+ds.0.1.0", OURS), ("0.19.8", THEIRS), ("0.19.8", None)]
)
def test_one_package_is_well(environment: Path, version: str, code: str | None):
    install(environment, version, code)
    assert dropin.dropin_problems() == []


def test_no_package_is_well(environment: Path):
    assert dropin.dropin_problems() == []


def test_files_of_the_original_over_ours_are_told(environment: Path):
    install(environment, "0.19.8+ds.0.1.0", THEIRS)
    (told,) = dropin.dropin_problems()
    assert "deepspeed 0.19.8+ds.0.1.0 of this suite is installed, but" in told
    assert "is the original's, which has overwritten it" in told
    assert "pip uninstall deepspeed" in told
    assert told_by_report() == [told]


def test_files_that_are_gone_are_told(environment: Path):
    install(environment, "0.19.8+ds.0.1.0", None)
    (told,) = dropin.dropin_problems()
    assert "its files are gone" in told


def test_the_original_in_a_folder_before_ours_is_no_matter(
    environment: Path, monkeypatch: pytest.MonkeyPatch
):
    install(environment / "ours", "0.19.8+ds.0.1.0", OURS)
    install(environment / "theirs", "0.19.8", THEIRS)
    monkeypatch.setattr(sys, "path", [str(environment / name) for name in ("theirs", "ours")])
    assert dropin.dropin_problems() == []


def test_the_launcher_warns_before_it_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ds_core.cli.run_command.dropin_problems", lambda: ["it is the original's"])
    done = CliRunner().invoke(make_app(), ["run", "--dry-run", "--nproc", "1", "train.py"])
    assert "warning: it is the original's" in done.stderr
