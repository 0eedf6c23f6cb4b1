"""New processes, and a compiler that takes no time and does as a test tells it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ds_ops.native import toolchain

_SCRIPT = """#!/bin/sh
. {folder}/settings
out=; before=
for word; do [ "$before" = -o ] && out=$word; before=$word; done
case " $* " in
*" --version "*) echo "$version"; exit "$version_status" ;;
*" -c "*) echo compile >> {folder}/calls; /bin/sleep "$seconds"
    if [ -n "$error" ]; then echo "$error" >&2; exit 1; fi
    : > "$out" ;;
*) echo link >> {folder}/calls; /bin/cp {real} "$out" ;;
esac
"""


class FakeCompiler:
    """Makes nothing of any source, and links to a copy of the real library."""

    def __init__(self, folder: Path, real: Path):
        self.folder = folder
        self.path = folder / "fake++"
        folder.mkdir()
        self.path.write_text(_SCRIPT.format(folder=folder, real=real))
        self.path.chmod(0o755)
        self.behave()

    def behave(self, *, version="fake++ 1.0", version_status=0, seconds=0.0, error=""):
        """What it does from now on."""
        (self.folder / "settings").write_text(
            f"version='{version}'; version_status={version_status}; seconds={seconds}; "
            f"error='{error}'\n"
        )
        toolchain._examine.cache_clear()

    def count(self, what):
        """How often it was called to "compile" or to "link"."""
        calls = self.folder / "calls"
        return calls.read_text().split().count(what) if calls.exists() else 0


def start(code, **env):
    """A new process that runs `code`; variables of value None are not set."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"} | env
    environ = {name: value for name, value in environ.items() if value is not None}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(code, **env):
    """What a new process prints last, as JSON, and its standard error."""
    process = start(code, **env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err
