"""What must work where only ds-ops and its closure (ds-core) are installed.

`nox -s alone` runs it from the built wheel, outside the source tree: `python -I smoke.py`. It runs
itself again where no compiler is to be found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

import ds_ops
from ds_core import ops

WITHOUT_COMPILER = "without-compiler"


def main() -> None:
    assert "site-packages" in Path(ds_ops.__file__).parts, ds_ops.__file__
    assert ds_ops.__version__ == version("ds-ops")
    assert "triton" not in sys.modules
    op_equals_its_reference()
    row = report_of("rms_norm")
    if row["implementation"] == "cpp":
        assert row["state"] in ("cached", "prebuilt"), row
        check_finds_nothing_wrong()
    else:
        assert "no C++ compiler" in row["unavailable"]["cpp"], row
    works_without_a_compiler()
    print("ds-ops", ds_ops.__version__, f"works alone: rms_norm by {row['implementation']}")


def op_equals_its_reference() -> None:
    x, weight = torch.randn(3, 33), torch.rand(33)
    expected = ops.run("rms_norm", x, weight, 1e-6, impl="reference")[0]
    assert torch.allclose(ds_ops.rms_norm(x, weight), expected, atol=1e-6)


def works_without_a_compiler() -> None:
    with tempfile.TemporaryDirectory() as empty:
        environ = {k: v for k, v in os.environ.items() if k != "CXX"}
        environ |= {"PATH": empty, "DS_OPS_CACHE": empty}
        command = [sys.executable, "-I", __file__, WITHOUT_COMPILER]
        subprocess.run(command, env=environ, check=True)


def op_is_computed_and_the_reason_told() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        op_equals_its_reference()
    chosen = ops.choose("rms_norm", "cpu").implementation
    if chosen.name == "cpp":  # the wheel holds the library
        assert chosen.state("cpu") == "prebuilt"
        return
    messages = [str(each.message) for each in told]
    assert len([text for text in messages if "no C++ compiler" in text]) == 1, messages
    assert "install g++" in report_of("rms_norm")["unavailable"]["cpp"]


def report_of(op: str) -> dict[str, object]:
    """The row of `ds ops report --json` on the CPU."""
    found = json.loads(ds("ops", "report", "--json"))
    return next(row for row in found["rows"] if (row["op"], row["device"]) == (op, "cpu"))


def check_finds_nothing_wrong() -> None:
    assert "is right" in ds("ops", "check", "rms_norm", "--impl", "cpp").replace("are", "is")


def ds(*words: str) -> str:
    command = Path(sys.executable).with_name("ds")
    return subprocess.run([command, *words], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    op_is_computed_and_the_reason_told() if WITHOUT_COMPILER in sys.argv else main()
