"""Which compiler, and what is said where there is none."""

from __future__ import annotations

import pytest
from native_processes import run

from ds_core.errors import BuildError
from ds_ops.native import library, toolchain

WITHOUT_COMPILER = """
import json, logging, warnings
import torch
from ds_core import ops
from ds_core.errors import DsError
from ds_core.ops.rms_norm import rms_norm

x, weight = torch.randn(3, 5), torch.rand(5)
found = {"equal": torch.equal(rms_norm(x, weight), ops.get("rms_norm").reference(x, weight)[0])}
rms_norm(x.bfloat16(), weight)
x.requires_grad_(); rms_norm(x, weight).sum().backward()
try:
    ops.run("rms_norm", x, weight, 1e-6, impl="cpp")
except DsError as error:
    found["by name"] = str(error)
import os
os.environ["DS_OPS_FALLBACK"] = "error"
try:
    ops.choose("rms_norm", "cpu")
except DsError as error:
    found["forbidden"] = str(error)
print(json.dumps(found))
"""


def test_without_a_compiler_the_reference_computes_and_says_so_once(tmp_path):
    found, err = run(WITHOUT_COMPILER, PATH="", CXX=None, DS_OPS_CACHE=str(tmp_path))
    assert found["equal"] is True
    assert err.count("run slower than they could: cpp: no C++ compiler") == 1, err
    assert "install g++ 11 or newer" in err
    for told in (found["by name"], found["forbidden"]):
        assert "install g++ 11 or newer" in told
    assert "DS_OPS_IMPL=rms_norm=reference" in found["forbidden"]
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_does_not_exist_is_an_error_not_an_absence(compiler, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert library.unavailable() is None  # or it would be passed over
    with pytest.raises(BuildError, match=r"CXX=/nowhere/g\+\+ is not found;") as raised:
        library.ensure()
    assert "unset CXX" in str(raised.value)


def test_a_compiler_that_does_not_start_is_an_error(compiler):
    compiler.behave(version_status=3)
    with pytest.raises(BuildError, match="--version` ended with 3"):
        library.ensure()


def test_options_in_cxx_reach_the_compiler(compiler, monkeypatch):
    monkeypatch.setenv("CXX", f"{compiler.path} --sysroot='/a b'")
    found = toolchain.find_compiler()
    assert found.command == (str(compiler.path), "--sysroot=/a b")
    assert str(found) == f"{compiler.path} '--sysroot=/a b'"
    library.ensure()


def test_the_first_compiler_on_path_that_starts_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    for name, status in (("c++", 1), ("g++", 0)):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\necho {name} 12\nexit {status}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.find_compiler() == toolchain.Compiler((str(tmp_path / "g++"),), "g++ 12")
