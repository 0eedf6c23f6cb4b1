"""Compile every C++ source of ds-ops for another kind of processor, to see that it can be.

    python scripts/cross_compile.py aarch64-linux-gnu-g++ aarch64

Nothing is linked or run: that takes a torch of that kind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ds_ops.native import sources


def main(compiler: str, kind: str) -> int:
    """Compile all; the number of sources that failed."""
    include, _ = sources.torch_folders()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(unit: sources.Unit) -> str:
            command = [compiler, *unit.flags, f"-I{sources.CSRC}", "-isystem", str(include)]
            command += ["-c", str(sources.CSRC / unit.source), "-o", str(Path(folder, unit.object))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return done.stderr if done.returncode else ""

        units = sources.units(kind)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failed = [text for text in pool.map(compile_one, units) if text]
    for text in failed:
        print(text)
    seconds = time.perf_counter() - begin
    print(f"{len(units) - len(failed)} of {len(units)} compiled for {kind} in {seconds:.0f} s")
    return len(failed)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(1 if main(*sys.argv[1:]) else 0)
