"""The CUDA library of this process: found or built, loaded once, and bound to ops by name."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import threading
from functools import cache as once
from pathlib import Path

from ds_core.errors import BuildError
from ds_ops.cuda_kernels import toolkit
from ds_ops.cuda_kernels.toolkit import Toolkit
from ds_ops.native import cache, library, sources, toolchain
from ds_ops.native.build import Recipe, build
from ds_ops.native.toolchain import Compiler
from ds_ops.triton_kernels import targets

FOLDER = Path(__file__).resolve().parent
#: What code is made for, as nvcc names it; other GPUs compile the last one's when it is loaded.
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "compute_80")
#: The least compute capability that any of it runs on.
_LEAST = 80

#: Registration of ops, which both libraries have.
_SHARED = "common/op.cpp"
_KERNEL_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v")
_OPERATOR_FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra"),
    f"-DTORCH_TARGET_VERSION={sources.TORCH_TARGET}",
)
#: What CUDA's runtime is made of stays hidden: another one in the process is not mixed with it.
_LINK_FLAGS = ("-shared", "-Wl,-soname,libds_ops.so", "-Wl,--gc-sections", "-Wl,--exclude-libs,ALL")

_lock = threading.Lock()


@once
def ops() -> tuple[str, ...]:
    """The ops that the library computes."""
    return sources.registered(FOLDER)


def unavailable(device_type: str) -> str | None:
    """Why it cannot run on such devices here, or None. Builds nothing."""
    if platform.system() != "Linux":
        return f"the CUDA kernels are for Linux, this is {platform.system()}"
    name = targets.architecture(device_type)
    if name is None:
        return f"torch finds no {device_type} device"
    if not name.startswith("sm_") or int(name.removeprefix("sm_")) < _LEAST:
        return f"for NVIDIA's GPUs from sm_{_LEAST} on; this is {name}"
    try:
        if find() is not None:
            return None
        if toolkit.find_toolkit() is None:
            return toolkit.MISSING
        return toolchain.missing() if toolchain.find_compiler() is None else None
    except BuildError:
        return None  # said when it is built


def find() -> Path | None:
    """The library that was built from these sources, or None."""
    for folder in (cache.PREBUILT, *cache.readable()):
        found = cache.built(folder, digest())
        if found is not None:
            return found
    return None


def state() -> str:
    """Either "prebuilt", "cached" or "will build"."""
    return cache.state_of(find())


def ensure() -> Path:
    """The library's path, after building it if need be. Raises BuildError if it cannot be built."""
    found = find()
    if found is not None and cache.is_whole(found):
        return found
    tools, compiler = toolkit.find_toolkit(), toolchain.find_compiler()
    if tools is None or compiler is None:
        missing = toolkit.MISSING if tools is None else toolchain.missing()
        raise BuildError(f"the CUDA kernels of ds-ops: {missing}")
    return build(recipe(tools, compiler), cache.root())


def bind(op: str, namespace: str, key: str) -> None:
    """Make the library's kernel that of `<namespace>::<op>` under a dispatch key.

    Raises BuildError if there is no library, or torch refuses the kernel.
    """
    with _lock:
        loaded = _loaded()
    library.bind_from(loaded, op, namespace, key)


@once
def _loaded() -> ctypes.CDLL:
    return library.opened(ensure())


def recipe(tools: Toolkit, compiler: Compiler) -> Recipe:
    """How the library is built."""
    return Recipe(
        what="the CUDA kernels",
        sources=digest(),
        tool=f"nvcc {tools.version}, {compiler.version}",
        command=f"{tools.nvcc}, {compiler}",
        plan=_plan(tools, compiler),
        remedy="mend what it names, or set CUDA_HOME to another toolkit, CXX to a compiler that "
        f"it takes, or do without by DS_OPS_IMPL={ops()[0]}=triton",
    )


@once
def digest() -> str:
    """Changes with every source and flag."""
    found = hashlib.sha256(platform.machine().encode())
    own = (path for path in FOLDER.iterdir() if path.suffix in (".cu", ".cpp", ".h"))
    for path in sorted([*own, *(sources.CSRC / "common").glob("*.h"), sources.CSRC / _SHARED]):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    flags = (*ARCHITECTURES, *_KERNEL_FLAGS, *_OPERATOR_FLAGS, *_LINK_FLAGS)
    found.update(" ".join(flags).encode())
    return found.hexdigest()


def _plan(tools: Toolkit, compiler: Compiler) -> str:
    """The text of build.ninja."""
    headers, libraries = sources.torch_folders()
    host = str(compiler).replace("$", "$$")
    include = f"-I{sources.quoted(sources.CSRC)} -I{sources.quoted(FOLDER)}"
    operator = f"{host} {' '.join(_OPERATOR_FLAGS)} {include} -isystem {sources.quoted(headers)}"
    operator += f" -isystem {sources.quoted(tools.include)} -MD -MF $out.d -c $in -o $out"
    kernel = f"{sources.quoted(tools.nvcc)} -ccbin {sources.quoted(Path(compiler.command[-1]))}"
    kernel += f" {' '.join((*_KERNEL_FLAGS, *_gencode()))} {include} -c $in -o $out"
    link = f"{host} $in -o $out {' '.join(_LINK_FLAGS)} {sources.quoted(tools.runtime)}"
    link += f" -L{sources.quoted(libraries)} -ltorch_cpu -ldl -lrt -lpthread"
    lines = [
        f"rule operator\n  command = {operator}\n  depfile = $out.d\n  deps = gcc",
        f"rule kernel\n  command = {kernel}",
        f"rule link\n  command = {link}",
    ]
    objects = []
    for path in (*sorted(FOLDER.glob("*.c*")), sources.CSRC / _SHARED):
        objects.append(f"{path.name}.o")
        rule = "kernel" if path.suffix == ".cu" else "operator"
        lines.append(f"build {objects[-1]}: {rule} {sources.escaped(path)}")
    lines.append(f"build {cache.LIBRARY}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _gencode() -> list[str]:
    """nvcc's options for `ARCHITECTURES`."""
    return [
        f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}" for name in ARCHITECTURES
    ]
