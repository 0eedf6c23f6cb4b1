"""What importing a package adds to `import torch`: seconds and modules, in fresh interpreters."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from ds_core.testing.original import original_deepspeed
from report import Check, Report, main, median

PACKAGES = ("ds_core", "ds_zero")
#: Our package of that name, from its source; and DeepSpeed itself, where it is installed.
DROPIN, ORIGINAL = "deepspeed (drop-in)", "deepspeed (the original)"
SOURCE = Path(__file__).parent.parent / "packages" / "deepspeed" / "src"
MAX_SECONDS, MAX_MODULES = 0.25, 120

PROBE = """
import importlib, json, sys, time
begin = time.perf_counter()
import torch
middle, before = time.perf_counter(), len(sys.modules)
importlib.import_module(sys.argv[1])
end = time.perf_counter()
print("\\n" + json.dumps([middle - begin, end - middle, len(sys.modules) - before]))
"""


def run(quick: bool = False) -> Report:
    """Seconds and modules that an import adds; the packages take turns."""
    report = Report(
        "import_time",
        "Import: what is added to `import torch`",
        ["package", "seconds added", "modules added", "seconds of torch"],
    )
    packages = [name for name in PACKAGES if importlib.util.find_spec(name)] + [DROPIN]
    packages += [ORIGINAL] if original_deepspeed() is not None else []
    found: dict[str, list[list[float]]] = {name: [] for name in packages}
    for turn in range(3 if quick else 10):
        for name in packages:
            figures = _probe(name)
            if turn:  # the first one may have to compile
                found[name].append(figures)
    for name, turns in found.items():
        torch_s, own_s, modules = (median(column) for column in zip(*turns, strict=True))
        report.rows.append([name, f"{own_s:.3f}", f"{int(modules)}", f"{torch_s:.2f}"])
        if name.startswith("ds_"):
            report.checks.append(Check(f"{name}: seconds added", own_s, MAX_SECONDS, " s"))
            report.checks.append(Check(f"{name}: modules added", int(modules), MAX_MODULES))
    if ORIGINAL in found:
        added = [median([turn[1] for turn in found[name]]) for name in (DROPIN, ORIGINAL)]
        report.checks.append(Check("drop-in: of DeepSpeed's seconds", added[0] / added[1], 1 / 3))
    report.raw = {"turns of (torch s, added s, added modules)": found}
    return report


def _probe(name: str) -> list[float]:
    own = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE, name.split(" ")[0]],
        env={**os.environ, "DS_ACCELERATOR": "cpu"}
        | ({"PYTHONPATH": own} if name == DROPIN else {}),
        check=True,
        capture_output=True,
        text=True,
    )
    figures: list[float] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main(run)
