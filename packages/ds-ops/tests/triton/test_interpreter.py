"""Every kernel in Triton against the reference, in Triton's interpreter, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_ops.triton_kernels import catalog

pytest.importorskip("triton", reason="triton is not installed")

#: Of the processor, for one call: larger shapes show nothing more.
MAX_SECONDS = 1.0


@pytest.mark.parametrize("op", sorted(catalog.OPS))
def test_it_computes_what_the_reference_does(op, interpreter):
    found = interpreter.check(op)
    assert not found["problems"], "\n".join(f"{k}:\n{v}" for k, v in found["problems"].items())
    assert found["cases"], f"{op}: nothing was computed"
    assert found["slowest"] <= MAX_SECONDS, f"{op}: a case takes {found['slowest']:.1f} s"


_NO_CLASS = """
import torch
from ds_ops.triton_kernels import cross_entropy as kernels
kernels.check_targets = lambda *args: None  # as on a GPU
logits, targets = torch.randn(4, 10), torch.tensor([1, 10, -1, -100])
found = kernels.cross_entropy(logits, targets, torch.ones(1), -100, 0.0, 0.0, 0.0, True)
total, losses, gradient = (t.isnan() for t in found)
same = torch.equal(losses, gradient.all(1)) and torch.equal(losses, gradient.any(1))
print(same, losses.tolist(), total)
"""


def test_a_target_that_is_no_class_makes_nan_where_nothing_waits_for_it():
    command = [sys.executable, "-W", "ignore", "-c", _NO_CLASS]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "True [False, True, True, False] tensor(True)\n"


def _bf16(*arguments):
    probe = str(Path(__file__).with_name("interpreter_probe.py"))
    command = [sys.executable, "-W", "ignore", probe, *arguments]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return done.stdout.split()


def test_bf16_is_right_as_mended():
    assert _bf16("mended") == ["dot", "True", "rounding", "True"]


def test_bf16_is_still_wrong_as_it_is():
    """Once this fails, Triton has mended it: delete interpreter_bf16.py."""
    assert _bf16() == ["dot", "False", "rounding", "False"]
