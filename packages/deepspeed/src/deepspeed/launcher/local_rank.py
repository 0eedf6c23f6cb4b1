"""Runs a script with `--local_rank=N` as its first argument, as the original launcher does.

    ds run --module deepspeed.launcher.local_rank python SCRIPT ARGUMENTS

The first word says how: "python" runs a file, "module" a module, "program" a program. The script
takes the place of this process, so that nothing of it is left when the script begins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_HOW = {"python": ("-u",), "module": ("-u", "-m")}


def command(words: Sequence[str], local_rank: str) -> list[str]:
    """The words of the process that is to run."""
    how, script, *arguments = words
    own = [script, f"--local_rank={local_rank}", *arguments]
    return own if how == "program" else [sys.executable, *_HOW[how], *own]


def main() -> None:
    """Become the script."""
    words = command(sys.argv[1:], os.environ["LOCAL_RANK"])
    os.execvp(words[0], words)


if __name__ == "__main__":
    main()
