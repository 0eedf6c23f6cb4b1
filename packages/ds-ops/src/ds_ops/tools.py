"""What ds-ops adds to `ds ops`: facts for the report, builds, benchmarks."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ds_core.errors import BuildError, OpError
from ds_core.seams import KernelSource
from ds_ops.native import build, cache, limits, processor, sources, toolchain
from ds_ops.triton_kernels import catalog, gpu_runs

#: What measures, and is no family itself.
_NO_FAMILY = ("timing", "floors")
_CUDA_NAMES = re.compile(r"(sm_?|compute_)?\d{2,3}a?|gfx\w+")


class Tools:
    """The `OpTools` of ds-ops."""

    def version(self) -> str:
        """The sources' digest, shortened."""
        return sources.digest()[:12]

    def folder(self) -> Path:
        """The cache of built libraries."""
        return cache.root()

    def facts(self) -> Mapping[str, str]:
        """Compiler, processor, torch, ninja, io_uring, limits and the cache."""
        return {
            "compiler": _compiler(),
            "instruction set": processor.told(),
            "torch": f"{torch.__version__} (kernels need 2.11 or newer)",
            "ninja": _ninja(),
            "io_uring": limits.io_uring() or "permitted",
            "lockable memory": limits.lockable_memory(),
            "cache": _cache(),
            "sources": self.version(),
        }

    def kernels(self) -> Sequence[KernelSource]:
        """Those in Triton, with the GPUs that result files say their present source ran on."""
        known = gpu_runs.runs()
        return [
            KernelSource(
                op, "triton", catalog.digest(catalog.module(op)), gpu_runs.ran_on(op, known)
            )
            for op in sorted(catalog.OPS)
        ]

    def build(
        self, architectures: Sequence[str], *, everything: bool, into_package: bool
    ) -> Sequence[str]:
        """Build the C++ library; it holds every instruction set of this kind of processor.

        Raises BuildError for other architectures, or if it does not build.
        """
        for name in architectures:
            _check_architecture(name)
        reason = sources.unsupported()
        if reason is not None:
            raise BuildError(f"ds ops build: {reason}")
        compiler = toolchain.find_compiler()
        if compiler is None:
            raise BuildError(f"ds ops build: {toolchain.missing()}")
        library = build.build(compiler, cache.root())
        if into_package:
            library = _into_package(library)
        meta = cache.read_meta(library.parent)
        sets = ", ".join(sources.instruction_sets())
        return [
            f"{library} ({library.stat().st_size / 1e6:.1f} MB for {sources.machine()}: {sets}; "
            f"built in {meta['seconds']} s by {meta['compiler']})"
        ]

    def benchmarks(self) -> Sequence[str]:
        """The modules of `ds_ops.bench`."""
        package = importlib.import_module("ds_ops.bench")
        found = [module.name for module in pkgutil.iter_modules(package.__path__)]
        return sorted(name for name in found if name not in _NO_FAMILY)

    def bench(self, families: Sequence[str], *, seconds: float, only: str, as_json: bool) -> bool:
        """Measure families; whether every target was reached. Raises OpError for unknown ones."""
        from ds_ops.bench import timing

        unknown = set(families) - set(self.benchmarks())
        if unknown:
            raise OpError(
                f"no benchmarks {', '.join(sorted(unknown))}; there are "
                f"{', '.join(self.benchmarks())}"
            )
        modules = {name: importlib.import_module(f"ds_ops.bench.{name}") for name in families}
        rows = {name: module.rows for name, module in modules.items()}
        found = timing.run(rows, seconds=seconds, only=only, as_json=as_json)
        return not any(row.missed for row in found)


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


def _check_architecture(name: str) -> None:
    if name == sources.machine():
        return
    if _CUDA_NAMES.fullmatch(name):
        raise BuildError(
            f"ds ops build --arch {name}: there are no CUDA or ROCm kernels in this version of "
            f"ds-ops; expected {sources.machine()}"
        )
    raise BuildError(
        f"ds ops build --arch {name}: this machine is {sources.machine()}, and the library is "
        f"built where it is used; build for {name} on such a machine"
    )


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


def _cache() -> str:
    try:
        return str(cache.root())
    except BuildError as error:
        return str(error)
