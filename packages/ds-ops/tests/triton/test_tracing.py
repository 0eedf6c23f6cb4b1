"""What torch.compile sees of kernels in Triton, with fake tensors of a GPU that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds_ops.triton_kernels import catalog

pytest.importorskip("triton", reason="triton is not installed")

HOP = "triton_kernel_wrapper_functional"


@pytest.fixture(scope="module")
def seen():
    probe = str(Path(__file__).with_name("tracing_probe.py"))
    done = subprocess.run([sys.executable, probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_op_with_a_kernel_is_computed_by_it_on_a_gpu(seen):
    assert {op: seen["chosen"][op] for op in catalog.OPS} == dict.fromkeys(catalog.OPS, "triton")


@pytest.mark.parametrize(
    ("name", "launches"),
    [("block", 2), ("backward", 1), ("in place", 1), ("sparse", 1), ("sparse backward", 2)],
)
def test_launches_are_part_of_the_graph(seen, name, launches):
    graph = seen[name]
    assert sum(HOP in node for node in graph) == launches, graph
    assert not [node for node in graph if node.startswith("ds_ops")], graph
