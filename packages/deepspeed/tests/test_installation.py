"""Files of both packages in one environment: told at import, with what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import deepspeed
from deepspeed import _installation
from deepspeed._errors import MixedInstallError


def test_the_package_alone_is_well():
    _installation.check(deepspeed.__path__)


@pytest.mark.parametrize("left", ["moe/__init__.py", "git_version_info_installed.py"])
def test_files_of_the_original_beside_ours_are_told(tmp_path, left):
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).touch()
    with pytest.raises(MixedInstallError, match=r"files of the original.*pip uninstall deepspeed"):
        _installation.check([str(tmp_path)])


def test_an_empty_folder_that_an_uninstallation_left_is_no_matter(tmp_path):
    (tmp_path / "moe" / "__pycache__").mkdir(parents=True)
    _installation.check([str(tmp_path)])


def test_two_distributions_in_one_folder_are_told(tmp_path, monkeypatch):
    for version in ("0.19.8", "0.19.8+ds.0.1.0"):
        (tmp_path / f"deepspeed-{version}.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MixedInstallError, match=r"2 distributions .* 0\.19\.8 and 0\.19\.8\+ds"):
        _installation.check([])


def test_two_folders_of_the_path_are_no_mixture(tmp_path, monkeypatch):
    for folder, version in (("env", "0.19.8+ds.0.1.0"), ("system", "0.19.8")):
        (tmp_path / folder / f"deepspeed-{version}.dist-info").mkdir(parents=True)
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    monkeypatch.syspath_prepend(str(tmp_path / "gone.zip"))
    _installation.check([])


def test_a_mixed_package_does_not_import(tmp_path):
    source = Path(deepspeed.__file__).parent
    mixed = tmp_path / "deepspeed"
    mixed.mkdir()
    for path in source.glob("*.py"):
        (mixed / path.name).write_bytes(path.read_bytes())
    (mixed / "pipe").mkdir()
    (mixed / "pipe" / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import deepspeed"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "MixedInstallError" in done.stderr
    assert "pipe/" in done.stderr
