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

#: By graph of tracing_probe.py: the kernels in it.
LAUNCHES = {
    "block": 2,
    "backward": 1,
    "in place": 1,
    "step": 2,
    "lamb": 2,
    "experts": 6,
    "codes": 3,
    "long group": 1,
    "long ternary group": 3,
    "long chunk": 2,
    "quantized": 2,
    "quantized, one row": 2,
    "quantized, backward": 2,
    "evoformer": 1,
    "evoformer backward": 3,
    "biases": 2,
    "attention": 1,
    "attention's gradient": 2,
    "decode": 4,
    "sparse": 1,
    "sparse backward": 2,
}


@pytest.fixture(scope="module")
def seen():
    probe = str(Path(__file__).with_name("tracing_probe.py"))
    done = subprocess.run([sys.executable, probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_op_with_a_kernel_is_computed_by_it_on_a_gpu(seen):
    both = ["torch", "triton"]
    shared = dict.fromkeys(
        ("grouped_mm", "grouped_mm_backward", "grouped_mm_fp8", "scaled_mm", "paged_attention"),
        both,
    )
    # Torch's takes what is faster there, ours 16 bits.
    shared |= {op: [*both, "reference"] for op in ("attention", "attention_backward")}
    for op in catalog.OPS:
        assert seen["chosen"][op] == shared.get(op, ["triton"]), op


@pytest.mark.parametrize(("name", "launches"), LAUNCHES.items())
def test_launches_are_part_of_the_graph(seen, name, launches):
    graph = seen[name]
    assert sum(HOP in node for node in graph) == launches, graph
    assert not [node for node in graph if node.startswith("ds_ops")], graph
