"""What ds-ops adds to `ds ops`: facts for the report, builds, benchmarks."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ds_core.errors import BuildError, OpError
from ds_core.seams import KernelSource
from ds_ops import gpu_runs
from ds_ops.cuda_kernels import library as cuda
from ds_ops.cuda_kernels import toolkit
from ds_ops.native import build, cache, limits, processor, sources, toolchain
from ds_ops.triton_kernels import checked, targets
from ds_ops.triton_kernels.targets import Target

#: What measures, and is no family itself.
_NO_FAMILY = ("timing", "floors")


class Tools:
    """The `OpTools` of ds-ops."""

    def version(self) -> str:
        """The sources' digest, shortened."""
        return sources.digest()[:12]

    def folder(self) -> Path:
        """The cache of built libraries."""
        return cache.root()

    def facts(self) -> Mapping[str, str]:
        """Compiler, processor, torch, ninja, triton, nvcc, io_uring, limits and the cache."""
        return {
            "compiler": _compiler(),
            "instruction set": processor.told(),
            "torch": f"{torch.__version__} (kernels need 2.11 or newer)",
            "ninja": _ninja(),
            "triton": _triton(),
            "nvcc": _nvcc(),
            "io_uring": limits.io_uring() or "permitted",
            "lockable memory": limits.lockable_memory(),
            "cache": _cache(),
            "sources": self.version(),
        }

    def kernels(self) -> Sequence[KernelSource]:
        """Those for GPUs, with the one that result files say their present source ran on."""
        known = gpu_runs.runs()
        return [
            KernelSource(
                *(each.op, each.implementation, each.digest, gpu_runs.ran_on(each, known)),
                _checks(each),
            )
            for each in gpu_runs.kernels()
        ]

    def build(
        self, architectures: Sequence[str], *, everything: bool, into_package: bool
    ) -> Sequence[str]:
        """Build the C++ library; it holds every instruction set of this kind of processor.

        For GPUs that are named, compile every kernel in Triton, and say whether it fits them; for
        NVIDIA's also build the library of CUDA kernels, where there is an nvcc.
        Raises BuildError for other architectures, or for what does not build.
        """
        gpus = [_gpu(name) for name in architectures if name != sources.machine()]
        made = [_compiled(target) for target in gpus]
        if any(target.backend == "cuda" for target in gpus):
            made.append(_cuda_library())
        if len(gpus) < len(architectures) or not architectures:
            made.insert(0, self._library(into_package))
        return made

    def _library(self, into_package: bool) -> str:
        reason = sources.unsupported()
        if reason is not None:
            raise BuildError(f"ds ops build: {reason}")
        compiler = toolchain.find_compiler()
        if compiler is None:
            raise BuildError(f"ds ops build: {toolchain.missing()}")
        library = build.build(sources.recipe(compiler), cache.root())
        if into_package:
            library = _into_package(library)
        meta = cache.read_meta(library.parent)
        sets = ", ".join(sources.instruction_sets())
        return (
            f"{library} ({library.stat().st_size / 1e6:.1f} MB for {sources.machine()}: {sets}; "
            f"built in {meta['seconds']} s by {meta['compiler']})"
        )

    def benchmarks(self) -> Sequence[str]:
        """The modules of `ds_ops.bench` that measure something which is here."""
        return [name for name in _families() if name not in self.unmeasured()]

    def unmeasured(self) -> Mapping[str, str]:
        """Kernels for GPUs where there is none."""
        return {} if torch.cuda.is_available() else {"gpu": "torch finds no GPU here"}

    def bench(self, families: Sequence[str], *, seconds: float, only: str, as_json: bool) -> bool:
        """Measure families; whether every target was reached. Raises OpError for unknown ones."""
        from ds_ops.bench import timing

        unknown = set(families) - set(_families())
        if unknown:
            raise OpError(
                f"no benchmarks {', '.join(sorted(unknown))}; there are "
                f"{', '.join(self.benchmarks())}"
            )
        modules = {name: importlib.import_module(f"ds_ops.bench.{name}") for name in families}
        rows = {name: module.rows for name, module in modules.items()}
        found = timing.run(rows, seconds=seconds, only=only, as_json=as_json)
        return not any(row.missed for row in found)


def _checks(kernel: gpu_runs.GpuKernel) -> tuple[str, ...]:
    """What this machine has seen of a kernel without a GPU."""
    if kernel.implementation == "triton":
        return checked.seen(kernel.op)
    return ("built",) if cuda.find() is not None else ()


def _families() -> list[str]:
    package = importlib.import_module("ds_ops.bench")
    found = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return sorted(name for name in found if name not in _NO_FAMILY)


def _into_package(library: Path) -> Path:
    """Copy a built library to where a wheel takes it from, in place of any other."""
    try:
        shutil.rmtree(cache.PREBUILT, ignore_errors=True)
        copied = shutil.copytree(library.parent, cache.PREBUILT / library.parent.name)
    except OSError as error:
        raise BuildError(
            f"ds ops build --into-package: {cache.PREBUILT}: {error}; use it in a source tree of "
            f"ds-ops that you may write"
        ) from error
    return copied / library.name


def _gpu(name: str) -> Target:
    """The target that an architecture's name means: "sm_90", "90a" or "gfx942"."""
    name = name.lower()
    number = re.fullmatch(r"(?:sm_?|compute_)?(\d{2,3})[af]?", name)
    target = targets.of_architecture(f"sm_{number[1]}" if number else name)
    if target is not None:
        return target
    if number or name.startswith("gfx"):
        raise BuildError(
            f"ds ops build --arch {name}: no kernels are made for it; expected "
            f"{', '.join(targets.TARGETS)}, or {sources.machine()}"
        )
    raise BuildError(
        f"ds ops build --arch {name}: this machine is {sources.machine()}, and the library is "
        f"built where it is used; build for {name} on such a machine; GPUs are "
        f"{', '.join(targets.TARGETS)}"
    )


def _compiled(target: Target) -> str:
    """Compile every kernel for a GPU, and say so."""
    if importlib.util.find_spec("triton") is None:
        raise BuildError(
            f"ds ops build --arch {target.name}: triton is not installed: pip install "
            f"'ds-ops[triton]'"
        )
    module = importlib.import_module("ds_ops.triton_kernels.compiling")
    found = module.compiled_for(target, cache.root())
    wrong = [f"\n  {each}" for each in found if each.problem]
    if wrong:
        raise BuildError(f"ds ops build --arch {target.name}:{''.join(wrong)}")
    for file in module.files():
        checked.mark_compiled(file, target.name)
    names = {each.kernel for each in found}
    return (
        f"{len(names)} kernels in {len(found)} configs compile for {target.name}: none takes more "
        f"shared memory than it has, none spills registers"
    )


def _cuda_library() -> str:
    """Build the library of CUDA kernels, and say so; or why there is none."""
    if toolkit.find_toolkit() is None and cuda.find() is None:
        return f"without the CUDA kernels ({', '.join(cuda.ops())}): {toolkit.MISSING}"
    library = cuda.ensure()
    made = ", ".join(cuda.ARCHITECTURES)
    return f"{library} ({library.stat().st_size / 1e6:.1f} MB for {made})"


def _nvcc() -> str:
    try:
        found = toolkit.find_toolkit()
    except BuildError as error:
        return " ".join(str(error).split())
    return f"{found.version} ({found.nvcc})" if found else toolkit.MISSING


def _compiler() -> str:
    try:
        found = toolchain.find_compiler()
    except BuildError as error:
        return " ".join(str(error).split())
    return f"{found.version} ({found})" if found else toolchain.missing()


def _ninja() -> str:
    try:
        return str(importlib.import_module("ninja").__version__)
    except ImportError:
        return "not installed: pip install ninja"


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed: pip install 'ds-ops[triton]'"


def _cache() -> str:
    try:
        return str(cache.root())
    except BuildError as error:
        return str(error)
