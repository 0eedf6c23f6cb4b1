"""Kernels compiled ahead of time, for GPUs that need not be here, and what is known of them then.

What a compilation tells is kept in the cache of ds-ops under a name made from the kernel's source,
its config, the target and Triton's version, so that only what changed is compiled again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from ds_core.errors import BuildError
from ds_ops.triton_kernels import catalog
from ds_ops.triton_kernels.kernel import Config, Kernel
from ds_ops.triton_kernels.targets import TARGETS, Target

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 15.0
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_VECTOR_REGISTERS = re.compile(r"\.vgpr_count:\s+(\d+)")
_VECTOR_SPILLED = re.compile(r"\.vgpr_spill_count:\s+(\d+)")
_PRIVATE = re.compile(r"\.private_segment_fixed_size:\s+(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What is known of one kernel, one config and one target.

    Attributes:
        kernel, config, target: what was compiled, and for what.
        shared: bytes of shared memory that a program takes.
        registers: of one thread.
        spilled: registers, or bytes of them, that did not fit and lie in memory.
        matrix: how many times the assembly has the instruction that the kernel must contain.
        limit: bytes of shared memory that there are.
        needed: that instruction; empty if there is none.
    """

    kernel: str
    config: str
    target: str
    shared: int
    registers: int
    spilled: int
    matrix: int
    limit: int
    needed: str

    @property
    def problem(self) -> str:
        """Why it would fail on the target, or be slow; empty if nothing is wrong."""
        if self.shared > self.limit:
            return f"takes {self.shared} bytes of shared memory, there are {self.limit}"
        if self.spilled:
            return f"spills {self.spilled} (it uses {self.registers} registers)"
        if self.needed and not self.matrix:
            return f"has no {self.needed}"
        return ""

    def __str__(self) -> str:
        told = self.problem or f"{self.registers} registers, {self.shared} bytes shared"
        return f"{self.kernel} [{self.config}] for {self.target}: {told}"


def kernels() -> list[Kernel]:
    """Every kernel there is."""
    return [kernel for module in catalog.modules() for kernel in _loaded(module).KERNELS]


def files() -> set[str]:
    """The files whose kernels are all among `kernels`, as `catalog.modules` names them."""
    named = {kernel.name for kernel in kernels()}
    return {
        module
        for module in catalog.modules()
        if {kernel.name for kernel in _loaded(module).KERNELS} <= named
    }


def _loaded(module: str) -> Any:
    return importlib.import_module(f"ds_ops.triton_kernels.{module}")


def cells(*names: str) -> Iterator[tuple[Kernel, Config, Target]]:
    """Each kernel with each of its configs for each target of these names; none: for all."""
    for kernel in kernels():
        for config in kernel.configs:
            for name in config.targets:
                if not names or name in names:
                    yield kernel, config, TARGETS[name]


def compiled_for(target: Target, folder: Path) -> list[Compiled]:
    """Every kernel with every config, compiled for a target. Raises BuildError as `compiled`.

    Says how far it is, as a warning, where that takes long: nothing else is seen for minutes.
    """
    found, waiting = [], list(cells(target.name))
    told = time.perf_counter()
    for cell in waiting:
        found.append(compiled(*cell, folder))
        if time.perf_counter() - told > _PATIENCE_SECONDS:
            told = time.perf_counter()
            text = "compiled %d of %d kernels and configs for %s; what is compiled is kept in %s"
            logger.warning(text, len(found), len(waiting), target.name, folder)
    return found


def compiled(kernel: Kernel, config: Config, target: Target, folder: Path) -> Compiled:
    """What comes of compiling a kernel, from the cache in `folder` if it was compiled before.

    Raises BuildError if it does not compile.
    """
    types = {**kernel.types, **config.constants}
    key = (kernel.function.cache_key, kernel.name, types, str(config), repr(target))
    needed = kernel.instructions.get(target.name, "")
    told = repr((*key, needed, triton.__version__)).encode()
    kept = folder / "triton" / f"{hashlib.sha256(told).hexdigest()[:20]}.json"
    try:
        return Compiled(**json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        found = _compile(kernel, config, target, needed)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False, encoding="utf-8") as file:
        json.dump(dataclasses.asdict(found), file)
    os.replace(file.name, kept)
    return found


def _compile(kernel: Kernel, config: Config, target: Target, needed: str) -> Compiled:
    names = kernel.function.arg_names
    types = {**kernel.types, **config.constants}
    missing = set(names) ^ set(types)
    if missing:
        raise BuildError(
            f"kernel {kernel.name}: its types and constants do not fit its arguments: "
            f"{', '.join(sorted(missing))}"
        )
    constants = {n: value for n, value in types.items() if not isinstance(value, str)}
    given = {n: "constexpr" if n in constants else str(types[n]) for n in names}
    signature = {n: kind.removesuffix(":16") for n, kind in given.items()}
    # As at a launch with tensors that begin at aligned addresses.
    divisible = [i for i, n in enumerate(names) if given[n].startswith("*") or ":16" in given[n]]
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    source = ASTSource(kernel.function, signature, constants, attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    try:
        done = triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=options,
        )
    except Exception as error:
        raise BuildError(
            f"kernel {kernel.name} [{config}] does not compile for {target.name}: {error}"
        ) from error
    text = done.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    registers, spilled = _of_ptx(text, target.arch) if target.backend == "cuda" else _of_gcn(text)
    return Compiled(
        *(kernel.name, str(config), target.name),
        *(int(done.metadata.shared), registers, spilled),
        *(text.count(needed) if needed else 0, target.shared, needed),
    )


def _of_gcn(text: str) -> tuple[int, int]:
    """Registers of a thread and how many were spilled, as AMD's assembly says itself.

    Scalar registers that do not fit are kept in a vector register, which costs no memory; if that
    is full too, they count with the bytes of memory that a thread has.
    """
    registers = max(map(int, _VECTOR_REGISTERS.findall(text)), default=0)
    spilled = (*_VECTOR_SPILLED.findall(text), *_PRIVATE.findall(text))
    return registers, sum(map(int, spilled))


def _of_ptx(text: str, arch: int | str) -> tuple[int, int]:
    """Registers of a thread and bytes that were spilled, as NVIDIA's assembler says."""
    found = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    architecture = found[1] if found else ""
    tool = get_ptxas(arch).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [tool, "-v", f"--gpu-name={architecture}", str(source), "-o", f"{source}.o"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    told = done.stdout + done.stderr
    registers = _REGISTERS.search(told)
    if done.returncode or registers is None:
        raise BuildError(f"{tool}: {told.strip() or done.returncode}")
    spilled = sum(int(n) for pair in _SPILLED.findall(told) for n in pair)
    return int(registers[1]), spilled
