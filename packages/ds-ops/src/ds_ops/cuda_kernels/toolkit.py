"""nvcc and what it links: of CUDA_HOME, of this Python's packages, or on PATH."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ds_core.errors import BuildError
from ds_ops import _env

#: What a user is told where there is no nvcc.
MISSING = (
    "no nvcc (in CUDA_HOME, in this Python's packages, on PATH); pip install 'ds-ops[nvcc]', or "
    "install the CUDA toolkit"
)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit.

    Attributes:
        nvcc: its compiler.
        version: such as "13.0.88".
        include: the folder of its headers.
        runtime: the CUDA runtime as a static library.
    """

    nvcc: Path
    version: str
    include: Path
    runtime: Path


def find_toolkit() -> Toolkit | None:
    """The first toolkit whose nvcc starts; None if there is no nvcc.

    Raises BuildError if CUDA_HOME names none, or nvcc is there without what it needs.
    """
    found = _find(_env.cuda_home(), _env.search_path(), tuple(sys.path))
    if isinstance(found, str):
        raise BuildError(found)
    return found


@cache
def _find(home: str | None, search_path: str, packages: tuple[str, ...]) -> Toolkit | str | None:
    problem = None
    for nvcc in _candidates(home, search_path, packages):
        found = _examine(nvcc)
        if isinstance(found, Toolkit):
            return found
        problem = problem or found
    if home and problem is None:
        return f"CUDA_HOME={home}: there is no bin/nvcc in it; name a CUDA toolkit, or unset it"
    return problem


def _candidates(home: str | None, search_path: str, packages: tuple[str, ...]) -> Iterator[Path]:
    if home:
        given = Path(home, "bin", "nvcc")
        if given.exists():
            yield given
        return
    for folder in packages:
        yield from sorted(Path(folder or ".").glob("nvidia/cu*/bin/nvcc"), reverse=True)
    on_path = shutil.which("nvcc", path=search_path)
    if on_path:
        yield Path(on_path)


def _examine(nvcc: Path) -> Toolkit | str:
    """The toolkit of a compiler, or what is wrong with it."""
    try:
        told = _ask(nvcc, "--version")
        # What it would do tells where its parts are, also through links and wrappers.
        plan = _ask(nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null")
    except (OSError, subprocess.SubprocessError) as error:
        return f"{nvcc} does not start: {error}"
    version, top = re.search(r", V(\S+)", told), re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if version is None or top is None:
        return f"{nvcc} does not say its version and folder:\n{told}{plan}"
    root = Path(top[1].strip()).resolve()
    include = root / "include"
    if not (include / "cuda_runtime_api.h").exists():
        return f"{nvcc}: {include} has no cuda_runtime_api.h; install the headers of CUDA's runtime"
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        runtime = root / folder / "libcudart_static.a"
        if runtime.exists():
            return Toolkit(nvcc, version[1], include, runtime)
    return f"{nvcc}: {root} has no libcudart_static.a; install CUDA's runtime for development"


def _ask(nvcc: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(nvcc), *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout + done.stderr
