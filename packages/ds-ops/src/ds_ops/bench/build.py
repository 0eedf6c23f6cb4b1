"""How long the first build takes, and what `import ds_ops` and a warm load cost."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ds_core.errors import BuildError
from ds_ops.bench import timing
from ds_ops.bench.timing import Row
from ds_ops.native import cache, library

#: Prints how long one thing takes in a fresh process, in milliseconds, after what it stands on.
_IMPORT = """
import sys, time
import torch, ds_core
begin = time.perf_counter()
import ds_ops
print((time.perf_counter() - begin) * 1e3)
assert "triton" not in sys.modules
"""
_LOAD = """
import time
import torch
from ds_core import ops
from ds_ops.native import library
ops.names()
begin = time.perf_counter()
library.load()
print((time.perf_counter() - begin) * 1e3)
"""
_BUILD = """
import json, os, time
from ds_ops.native import cache, library
begin = time.perf_counter()
meta = cache.read_meta(library.ensure().parent)
times = os.times()
print(json.dumps([(time.perf_counter() - begin) * 1e3,
                  times.children_user + times.children_system, meta["compiler"]]))
"""


def rows(seconds: float) -> Iterator[Row]:
    """Measure in fresh processes: some of them per row, and one build."""
    runs = max(3, int(seconds * 3))
    yield _row("import ds_ops", "after torch, ds_core", [_run(_IMPORT) for _ in range(runs)], 50.0)
    library.ensure()
    yield _row("load", "a built library", [_run(_LOAD) for _ in range(runs)], 50.0)
    with tempfile.TemporaryDirectory() as folder:
        # Not from the cache of a compiler.
        told = _process(_BUILD, DS_OPS_CACHE=folder, CCACHE_DISABLE="1")
        ms, core_seconds, compiler = json.loads(told)
        if not any(Path(folder).glob("*/" + cache.LIBRARY)):
            raise BuildError("the library came in the wheel: there is nothing to build")
    shape = f"{len(os.sched_getaffinity(0))} cores"
    note = f"{core_seconds:.0f} core-seconds, {compiler}"
    yield _row("first build", shape, [ms], 60_000.0, note=note)


def _row(op: str, shape: str, samples: list[float], most_ms: float, note: str = "") -> Row:
    median = statistics.median(samples)
    # What is allowed stands in the floor's place: 1 x is the most that it may take.
    return Row(
        *(op, shape, "", min(samples)),
        floor_ms=most_ms,
        max_x_floor=1.0,
        median_ms=median,
        threads=1,
        note="; ".join(filter(None, (f"allowed: {most_ms:.0f} ms", note))),
    )


def _run(code: str) -> float:
    return float(_process(code))


def _process(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BuildError(f"a process that measures failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    timing.main(rows)
