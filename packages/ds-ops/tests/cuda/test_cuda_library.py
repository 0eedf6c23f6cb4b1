"""The CUDA library: built by nvcc without a GPU, and loaded where torch has no CUDA."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_core import ops
from ds_core.errors import BuildError, OpError
from ds_core.ops import library as operators
from ds_ops.cuda_kernels import library, toolkit
from ds_ops.implementations import Cuda
from ds_ops.native import cache, toolchain
from ds_ops.tools import Tools
from ds_ops.triton_kernels import targets

_SYMBOLS = Path(__file__).parents[1] / "native" / "torch_2_11_symbols.txt"
#: Of every shared library that GCC makes.
_OPTIONAL = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
_CELLS = 3 * 2 * 3  # dtypes, widths of an index, architectures with code of their own


@pytest.fixture(scope="module")
def built():
    """The library's path."""
    for missing in (
        toolkit.MISSING if toolkit.find_toolkit() is None else None,
        toolchain.missing() if toolchain.find_compiler() is None else None,
    ):
        if missing:
            pytest.skip(missing)
    return library.ensure()


@pytest.fixture
def gpu(monkeypatch):
    """Gives the machine a GPU of some architecture."""

    def give(name):
        monkeypatch.setattr(targets, "architecture", lambda device_type, index=None: name)

    give("sm_90")
    return give


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    """No nvcc, and no library in the cache."""
    monkeypatch.setenv("DS_OPS_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(toolkit, "_candidates", lambda *_: iter(()))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    toolkit._find.cache_clear()
    yield tmp_path
    toolkit._find.cache_clear()


def symbols(path, which):
    command = ["nm", "-D", which, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


def test_the_build_spills_nothing_and_warns_of_nothing(built, tmp_path):
    made = library.build(
        library.recipe(toolkit.find_toolkit(), toolchain.find_compiler()), tmp_path
    )
    assert cache.is_whole(made)
    (log,) = tmp_path.glob("*.log")
    told = log.read_text()
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", told)
    assert len(spilled) == _CELLS
    assert {number for each in spilled for number in each} == {"0"}
    assert {f"sm_{n}" for n in ("80", "90a", "100")} == set(re.findall(r"for '(\w+)'", told))
    assert "warning" not in told


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
def test_it_takes_nothing_from_outside_but_torchs_stable_abi(built):
    wanted = {name for name in symbols(built, "--undefined-only") if "@" not in name} - _OPTIONAL
    # Nothing of libtorch_cuda or CUDA's own libraries, which are not everywhere.
    assert wanted - set(_SYMBOLS.read_text().split()) == set()
    shown = {name for name in symbols(built, "--defined-only") if not name.startswith("_ZSt")}
    assert {name for name in shown if "cuda" in name or "2ds" in name} == set()
    assert "ds_ops_bind" in shown


def test_it_loads_where_torch_has_no_cuda(built):
    program = (
        "import torch\n"
        "from ds_core import ops\n"
        "from ds_ops.cuda_kernels import library\n"
        "ops.define('sign_unpack', 'ds_ops_cuda')\n"
        "library.bind('sign_unpack', 'ds_ops_cuda', 'CUDA')\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(has('ds_ops_cuda::sign_unpack', 'CUDA'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_an_op_it_does_not_have_is_told(built):
    with pytest.raises(BuildError, match="the library has no kernel for op 'rms_norm'"):
        library.bind("rms_norm", operators.NAMESPACE, "CUDA")


def test_it_is_for_gpus_of_nvidia_and_asked_for_by_name(gpu, built):
    assert ops.available("sign_unpack", "cpu")["cuda"] == "for cuda only"
    assert library.unavailable("cuda") is None
    assert Cuda("sign_unpack").state("cuda") == "cached"
    assert ops.choose("sign_unpack", "cuda", "cuda").implementation.name == "cuda"
    gpu("sm_75")
    assert library.unavailable("cuda") == "for NVIDIA's GPUs from sm_80 on; this is sm_75"
    gpu("gfx942")
    assert library.unavailable("cuda").endswith("this is gfx942")
    gpu(None)
    with pytest.raises(OpError, match="'cuda' cannot run on cuda: torch finds no cuda device"):
        ops.choose("sign_unpack", "cuda", "cuda")


def test_without_nvcc_it_says_what_to_install(nothing, gpu):
    assert library.unavailable("cuda") == toolkit.MISSING
    assert library.state() == "will build"
    with pytest.raises(BuildError, match=r"pip install 'ds-ops\[nvcc\]'"):
        library.ensure()
    assert Tools().facts()["nvcc"] == toolkit.MISSING


def test_a_cuda_home_without_nvcc_is_an_error(nothing, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(nothing))
    with pytest.raises(BuildError, match=r"CUDA_HOME=.*: there is no bin/nvcc in it"):
        toolkit.find_toolkit()
    assert Tools().facts()["nvcc"].startswith("CUDA_HOME=")


def test_an_nvcc_without_its_parts_is_told(nothing, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'release 13.0, V13.0.1'\necho '#$ TOP={tmp_path}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(toolkit, "_candidates", lambda *_: iter((nvcc,)))
    with pytest.raises(BuildError, match=r"has no cuda_runtime_api\.h; install the headers"):
        toolkit.find_toolkit()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").touch()
    toolkit._find.cache_clear()
    with pytest.raises(BuildError, match=r"has no libcudart_static\.a; install CUDA's runtime"):
        toolkit.find_toolkit()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart_static.a").touch()
    toolkit._find.cache_clear()
    found = toolkit.find_toolkit()
    assert (found.version, found.include) == ("13.0.1", tmp_path / "include")


def test_the_packages_of_this_python_come_before_the_path(monkeypatch, tmp_path):
    for folder in ("cu12", "cu13"):
        nvcc = tmp_path / "nvidia" / folder / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
    found = list(toolkit._candidates(None, str(nvcc.parent), (str(tmp_path),)))
    assert [path.parts[-3] for path in found] == ["cu13", "cu12", "cu13"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_what_the_reference_does_beyond_the_cases(built, dtype):
    """Sizes at which the last thread writes a part, and an index takes 64 bits."""
    sizes = [(5, 1), (4096 * 7 + 3, 1), (4096 * 8, 32)]
    if torch.cuda.mem_get_info()[0] > 24 << 30:
        sizes.append((2**32 + 8, 1))
    for numel, chunks in sizes:
        codes = torch.randint(256, ((numel + 7) // 8,), dtype=torch.uint8, device="cuda")
        scales = torch.rand(chunks, device="cuda")
        found = ops.run("sign_unpack", codes, scales, numel, dtype, impl="cuda")
        # The last ones only: the reference takes 64 times the memory.
        at = torch.arange(max(0, numel - 4096), numel, device="cuda")
        bits, scale = (codes[at // 8].long() >> (at % 8)) & 1, scales[at // (numel // chunks)]
        assert torch.equal(found[at], torch.where(bits == 1, scale, -scale).to(dtype))
