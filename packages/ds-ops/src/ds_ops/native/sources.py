"""What the library is compiled from, and with which flags.

Files named `*.kernel.cpp` hold the arithmetic and are compiled once per instruction set, so that
one library runs well on every processor of its kind (csrc/common/isa.h chooses when it runs); all
other `.cpp` files are operators and are compiled for the least of them.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch

from ds_ops import _env
from ds_ops.native import cache as built
from ds_ops.native.build import Recipe
from ds_ops.native.toolchain import Compiler

CSRC = Path(__file__).resolve().parent.parent / "csrc"

#: torch's stable ABI as of 2.11: the library runs with that version of torch and every later one.
TORCH_TARGET = "0x020b000000000000ULL"

_COMMON = (
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-DNDEBUG",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    # False alarms inside GCC 12's own headers of AVX-512.
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-Wno-unknown-warning-option",
)
#: a * b + c in one operation, no errno from sqrt; NaN, infinities and signed zeros stay exact.
_ARITHMETIC = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")

#: Flags by instruction set, by kind of processor. The names are those of csrc/common/isa.h.
_INSTRUCTION_SETS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "x86_64": {
            "baseline": (),
            "avx2": ("-mavx2", "-mfma", "-mf16c"),
            "avx512": (
                *("-mavx2", "-mfma", "-mf16c"),
                *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
                "-mprefer-vector-width=512",
            ),
        },
        "aarch64": {"baseline": ()},
    }
)


@dataclass(frozen=True)
class Unit:
    """One compilation: a source, relative to csrc, and the object made from it."""

    source: str
    object: str
    flags: tuple[str, ...]


def machine() -> str:
    """The kind of processor, as the compiler's target names it."""
    return platform.machine()


def unsupported() -> str | None:
    """Why the library cannot be built for this machine at all, or None."""
    if platform.system() != "Linux":
        return f"the C++ kernels are for Linux, this is {platform.system()}"
    if machine() not in _INSTRUCTION_SETS:
        return f"the C++ kernels are for x86_64 and aarch64, this is {machine()}"
    return None


def instruction_sets() -> tuple[str, ...]:
    """Those that kernels are compiled for on this kind of machine."""
    return tuple(_INSTRUCTION_SETS[machine()])


def units(kind: str | None = None) -> list[Unit]:
    """Everything that is compiled for a kind of processor; None: for that of this machine."""
    found: list[Unit] = []
    extra = _sanitizer_flags()
    for path in sorted(CSRC.rglob("*.cpp")):
        name = path.relative_to(CSRC).as_posix()
        stem = name.removesuffix(".cpp").replace("/", "_")
        if not name.endswith(".kernel.cpp"):
            found.append(Unit(name, f"{stem}.o", (*_COMMON, "-O2", *extra)))
            continue
        for isa, flags in _INSTRUCTION_SETS[kind or machine()].items():
            own = (*_COMMON, *_ARITHMETIC, *flags, f"-DDS_ISA={isa}", *extra)
            found.append(Unit(name, f"{stem}.{isa}.o", own))
    return found


@cache
def ops() -> tuple[str, ...]:
    """The ops that the library computes."""
    return registered(CSRC)


def registered(folder: Path) -> tuple[str, ...]:
    """The ops that a `DS_OP(op, function)` below a folder registers."""
    found: set[str] = set()
    for path in folder.rglob("*.cpp"):
        text = path.read_text(encoding="utf-8")
        found.update(re.findall(r"^DS_OP\((\w+),", text, re.MULTILINE))
    return tuple(sorted(found))


def link_flags() -> tuple[str, ...]:
    """Of the one shared library."""
    return ("-shared", "-Wl,-soname,libds_ops.so", "-Wl,--gc-sections", *_sanitizer_flags())


def torch_folders() -> tuple[Path, Path]:
    """Where torch keeps its headers and its libraries."""
    root = Path(torch.__file__).resolve().parent
    return root / "include", root / "lib"


def digest() -> str:
    """Changes with every source, header and flag; the same on every machine of this kind."""
    return _digest(_env.sanitizer())


@cache
def _digest(sanitizer: str | None) -> str:
    """As `digest`; the one flag that depends on the environment is an argument, to be cached."""
    found = hashlib.sha256(machine().encode())
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".h")):
        found.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    for unit in units():
        found.update(" ".join((unit.source, *unit.flags)).encode())
    found.update(" ".join(link_flags()).encode())
    return found.hexdigest()


def _sanitizer_flags() -> tuple[str, ...]:
    if _env.sanitizer() is None:
        return ()
    return ("-fsanitize=address", "-fno-omit-frame-pointer", "-g")


def recipe(compiler: Compiler) -> Recipe:
    """How the library is built."""
    return Recipe(
        what="the C++ kernels",
        sources=digest(),
        tool=compiler.version,
        command=str(compiler),
        plan=_plan(compiler),
        remedy="mend what it names, or set CXX to another compiler (g++ >= 11 or clang++ >= 14), "
        "or do without by DS_OPS_IMPL='*=reference'",
    )


def _plan(compiler: Compiler) -> str:
    """The text of build.ninja."""
    headers, libraries = torch_folders()
    command = str(compiler).replace("$", "$$")
    csrc, include, lib = map(quoted, (CSRC, headers, libraries))
    compile_ = f"{command} $flags -I{csrc} -isystem {include}"
    compile_ += f" -ffile-prefix-map={csrc}=ds_ops -MD -MF $out.d -c $in -o $out"
    linked = " ".join(link_flags())
    lines = [
        f"rule compile\n  command = {compile_}\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {command} $in -o $out {linked} -L{lib} -ltorch_cpu",
    ]
    found = units()
    for unit in found:
        source = escaped(CSRC / unit.source)
        lines.append(f"build {unit.object}: compile {source}\n  flags = {' '.join(unit.flags)}")
    lines.append(f"build {built.LIBRARY}: link {' '.join(unit.object for unit in found)}")
    return "\n".join(lines) + "\n"


def quoted(path: Path) -> str:
    """A path for a command in build.ninja: quoted for the shell, with ninja's own signs escaped."""
    return shlex.quote(str(path)).replace("$", "$$")


def escaped(path: Path) -> str:
    """A path as a name in build.ninja."""
    return re.sub(r"([$: ])", r"$\1", str(path))
