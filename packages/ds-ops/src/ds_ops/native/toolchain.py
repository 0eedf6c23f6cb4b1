"""The C++ compiler of this machine."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache

from ds_ops import _env

_CANDIDATES = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: its path.
        version: the first line of what it says of itself.
    """

    command: str
    version: str


def find_compiler() -> Compiler | None:
    """The compiler that CXX names, else the first on PATH; None if there is none that starts."""
    return _examine(_env.compiler())


def missing() -> str:
    """What a user is told where there is no compiler."""
    given = _env.compiler()
    looked = f"CXX={given}" if given else f"none of {', '.join(_CANDIDATES)} on PATH"
    return f"no C++ compiler ({looked}); install g++ 11 or newer, or a wheel of ds-ops built here"


@cache
def _examine(given: str | None) -> Compiler | None:
    for name in (given,) if given else _CANDIDATES:
        command = shutil.which(name)
        if command is None:
            continue
        told = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
        if told.returncode == 0 and told.stdout:
            return Compiler(command, told.stdout.splitlines()[0])
    return None
