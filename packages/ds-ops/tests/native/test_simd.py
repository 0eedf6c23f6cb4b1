"""The vectors that every kernel is written with, for each instruction set, and for ARM by QEMU."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from ds_ops import _env
from ds_ops.native import processor, sources, toolchain

CHECK = Path(__file__).with_name("simd_check.cpp")
CROSS, EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")


def flags_of(kind, isa):
    """With which kernels of that instruction set are compiled."""
    units = sources.units(kind)
    unit = next(unit for unit in units if unit.object.endswith(f".{isa}.o"))
    return unit.flags


def check(compiler, flags, folder, run=()):
    made = folder / "simd_check"
    command = [*compiler, *flags, f"-I{sources.CSRC}", str(CHECK), "-o", str(made)]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, f"{shlex.join(command)}\n{compiled.stderr}"
    done = subprocess.run([*run, str(made)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("isa", _env.INSTRUCTION_SETS)
def test_vectors_compute_as_scalars_do(isa, tmp_path):
    compiler = toolchain.find_compiler()
    if compiler is None or isa not in sources.instruction_sets():
        pytest.skip("no compiler, or another kind of processor")
    if processor.best() in _env.INSTRUCTION_SETS:
        order = _env.INSTRUCTION_SETS.index
        if order(isa) > order(processor.best()):
            pytest.skip(f"this processor has {processor.best()} only")
    check(compiler.command, flags_of(None, isa), tmp_path)


def test_vectors_of_arm_compute_as_scalars_do(tmp_path):
    absent = [name for name in (CROSS, EMULATOR[0]) if shutil.which(name) is None]
    if absent:
        pytest.skip(f"needs {' and '.join(absent)}")
    check((CROSS,), (*flags_of("aarch64", "baseline"), "-static"), tmp_path, run=EMULATOR)
