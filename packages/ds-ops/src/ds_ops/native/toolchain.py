"""The C++ compiler of this machine."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache

from ds_core.errors import BuildError
from ds_ops import _env

_CANDIDATES = ("c++", "g++", "clang++")
_SHOWN_LINES = 10


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: its path, and options that CXX gives it.
        version: the first line of what it says of itself.
    """

    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return shlex.join(self.command)


def find_compiler() -> Compiler | None:
    """The compiler that CXX names, else the first on PATH that starts; None if there is none.

    Raises BuildError if CXX names one that is not there or does not start.
    """
    found = _examine(_env.compiler(), _env.search_path())
    if isinstance(found, str):
        raise BuildError(found)
    return found


def missing() -> str:
    """What a user is told where there is no compiler."""
    return (
        f"no C++ compiler (none of {', '.join(_CANDIDATES)} on PATH); install g++ 11 or newer, or "
        f"a wheel of ds-ops that was built with one"
    )


@cache
def _examine(given: str | None, search_path: str) -> Compiler | str | None:
    """The compiler, None if there is none, or what is wrong with the one that was named."""
    problem = None
    for name in (given,) if given else _CANDIDATES:
        words = shlex.split(name)
        command = shutil.which(words[0], path=search_path) if words else None
        if command is None:
            problem = " is not found"
            continue
        words[0] = command
        try:
            told = subprocess.run(
                [*words, "--version"], capture_output=True, text=True, check=False, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = f" does not start: {error}"
            continue
        if told.returncode == 0 and told.stdout:
            return Compiler(tuple(words), told.stdout.splitlines()[0])
        lines = "\n".join(f"    {line}" for line in told.stderr.splitlines()[:_SHOWN_LINES])
        problem = f": `{shlex.join([*words, '--version'])}` ended with {told.returncode}:\n{lines}"
    if not given:
        return None
    return (
        f"CXX={given}{problem};\nname a C++ compiler that works (g++ >= 11 or "
        f"clang++ >= 14), or unset CXX to use the first on PATH"
    )
