"""The built library: what it needs from outside, and which code it runs where."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native_processes import run

from ds_core.errors import BuildError
from ds_ops import _env
from ds_ops.native import library, processor, sources, toolchain

#: What libtorch_cpu.so of torch 2.11 exports of its stable ABI.
SYMBOLS = Path(__file__).with_name("torch_2_11_symbols.txt").read_text().split()

ISA = """
import json, time
import torch
from ds_ops.native import library
begin = time.perf_counter()
library.load()
seconds = time.perf_counter() - begin
from ds_core.ops.rms_norm import rms_norm
x = torch.linspace(-2, 2, 4 * 1003).view(4, 1003)
y = rms_norm(x, torch.ones(1003)).double()
print(json.dumps({"isa": library.isa(), "seconds": seconds, "sum": float(y.square().sum())}))
"""

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")


def undefined(path):
    """Symbols that a shared library takes from others, without their version."""
    command = ["nm", "-D", "--undefined-only", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


@needs_nm
def test_it_needs_nothing_of_torch_that_2_11_does_not_have(real_library):
    wanted = {name for name in undefined(real_library) if name.startswith(("aoti_", "torch_"))}
    assert wanted
    assert wanted - set(SYMBOLS) == set()


@needs_nm
def test_it_needs_nothing_but_torchs_stable_abi_and_the_c_and_cpp_libraries(real_library):
    optional = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    unversioned = {name for name in undefined(real_library) if "@" not in name} - optional
    # No symbol of Python (Py*), of torch's C++ (at::, c10::), of CUDA.
    assert {name for name in unversioned if not name.startswith(("aoti_", "torch_"))} == set()


@needs_nm
def test_it_shows_nothing_but_its_own_functions(real_library):
    command = ["nm", "-D", "--defined-only", str(real_library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    assert {"ds_ops_bind", "ds_ops_isa"} <= names
    assert not {name for name in names if "2ds" in name}  # nothing of namespace ds


@needs_nm
def test_no_kernel_object_offers_code_that_another_could_pick_up(real_library, tmp_path):
    """Weak symbols are merged across objects: one compiled for AVX-512 would run everywhere."""
    compiler = toolchain.find_compiler()
    if compiler is None:
        pytest.skip("no compiler")
    include, _ = sources.torch_folders()
    best = sources.instruction_sets()[-1]
    kernels = [unit for unit in sources.units() if unit.object.endswith(f".{best}.o")]

    def weak(unit):
        # Nothing is inlined that need not be, so that nothing hides.
        flags = [flag for flag in unit.flags if flag != "-O3"] + ["-O1", "-fno-inline"]
        command = [*compiler.command, *flags, f"-I{sources.CSRC}", "-isystem", str(include)]
        made = tmp_path / unit.object
        subprocess.run(
            [*command, "-c", str(sources.CSRC / unit.source), "-o", str(made)], check=True
        )
        told = subprocess.run(["nm", "-C", str(made)], capture_output=True, text=True, check=True)
        lines = [line[17:] for line in told.stdout.splitlines()]
        return [f"{unit.source}: {line}" for line in lines if line[:2] in ("W ", "V ", "u ")]

    assert kernels
    with ThreadPoolExecutor(2) as pool:
        assert [name for found in pool.map(weak, kernels) for name in found] == []


def test_every_instruction_set_gives_the_same_results(real_library):
    best = processor.best()
    if best == "neon":
        found = {"neon": run(ISA)[0]}
    else:
        order = _env.INSTRUCTION_SETS
        names = order[: order.index(best) + 1]
        found = {name: run(ISA, DS_OPS_ISA=name)[0] for name in names}
    assert {name: one["isa"] for name, one in found.items()} == {name: name for name in found}
    sums = [one["sum"] for one in found.values()]
    assert max(sums) - min(sums) < 1e-3
    # Loosely, for machines that do much else; `ds ops bench build` measures it.
    assert min(one["seconds"] for one in found.values()) < 0.5


def test_a_better_instruction_set_than_the_processors_is_not_used(monkeypatch):
    monkeypatch.setattr(processor, "best", lambda: "avx2")
    monkeypatch.setenv("DS_OPS_ISA", "avx512")
    assert processor.used() == processor.told() == "avx2"
    monkeypatch.setenv("DS_OPS_ISA", "baseline")
    assert processor.told() == "baseline, by DS_OPS_ISA=baseline; the processor has avx2"


def test_an_instruction_set_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("DS_OPS_ISA", "avx9")
    library._outcome.cache_clear()
    try:
        with pytest.raises(BuildError, match=r"DS_OPS_ISA='avx9'.*expected baseline, avx2, avx512"):
            library.load()
    finally:
        library._outcome.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks an x86_64 processor")
def test_python_and_the_library_agree_on_the_processor(real_library):
    assert library.isa() == processor.used()


def test_the_digest_changes_with_every_source_and_flag(tmp_path, monkeypatch):
    shutil.copytree(sources.CSRC / "common", tmp_path / "common")
    monkeypatch.setattr(sources, "CSRC", tmp_path)

    def digest():
        sources._digest.cache_clear()
        return sources.digest()

    try:
        found = [digest()]
        (tmp_path / "common" / "half.h").write_text("// changed\n")
        found.append(digest())
        (tmp_path / "common" / "new.kernel.cpp").write_text("\n")
        found.append(digest())
        monkeypatch.setenv("DS_OPS_SANITIZE", "address")
        found.append(digest())
        assert len(set(found)) == len(found)
        monkeypatch.delenv("DS_OPS_SANITIZE")
        assert digest() == found[-2]
    finally:
        monkeypatch.undo()
        sources._digest.cache_clear()


def test_an_op_is_what_a_line_of_the_sources_registers():
    assert {"rms_norm", "rms_norm_backward"} <= set(sources.ops())
    lines = [
        line
        for path in sources.CSRC.rglob("*.cpp")
        for line in path.read_text().splitlines()
        if re.match(r"\s*DS_OP\(", line)
    ]
    assert len(lines) == len(sources.ops()), "DS_OP( must begin its line, and each op be there once"


def test_a_machine_without_kernels_says_which_have_them(monkeypatch):
    monkeypatch.setattr(sources.platform, "machine", lambda: "riscv64")
    assert "x86_64 and aarch64, this is riscv64" in library.unavailable()
    monkeypatch.setattr(sources.platform, "system", lambda: "Darwin")
    assert "are for Linux, this is Darwin" in library.unavailable()
