"""A transformer block made of these ops: compiled as one graph, and on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import ds_ops
from ds_core.ops.rope import rope_tables
from ds_ops.native import library

OPS = (
    *("rms_norm", "rms_norm_backward", "layer_norm", "layer_norm_backward", "rope", "rope_"),
    *("gated_activation", "gated_activation_backward", "gated_activation_packed"),
    *("gated_activation_packed_backward", "cross_entropy", "cross_entropy_"),
)

_CHECK = """
import sys, torch
from ds_core import ops
from ds_core.ops.checking import compare
from ds_ops.native import library
assert library.isa() == sys.argv[1], library.isa()
for name in sys.argv[2:]:
    op = ops.get(name)
    for dtype in op.dtypes:
        for index, args in enumerate(op.cases(torch.device("cpu"), dtype)):
            found = compare(op, lambda *a: ops.run(name, *a, impl="cpp"), args)
            assert not found.problem, f"{name} {dtype} case {index}: {found.problem}"
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_older_instruction_sets_compute_the_same(isa: str) -> None:
    if library.unavailable() or library.isa() in ("neon", "baseline"):
        pytest.skip("no older instruction set than the one that all tests run with")
    done = subprocess.run(
        [sys.executable, "-c", _CHECK, isa, *OPS],
        env={**os.environ, "DS_OPS_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


class Block(torch.nn.Module):
    """A block as of Llama, with a loss on top of it; of ds-ops, or of plain torch."""

    def __init__(self, fused: bool, d: int = 32, heads: int = 4, classes: int = 50) -> None:
        super().__init__()
        self.fused, self.heads = fused, heads
        self.norms = torch.nn.ParameterList(torch.rand(d) + 0.5 for _ in range(3))
        self.qkv = torch.nn.Linear(d, 3 * d)
        self.out = torch.nn.Linear(d, d)
        self.up = torch.nn.Linear(d, 4 * d)
        self.down = torch.nn.Linear(2 * d, d)
        self.head = torch.nn.Parameter(torch.randn(classes, d) * 0.1)

    def attention(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, d = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).unbind(2)
        rotate = ds_ops.rope if self.fused else _plain_rope
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, d))

    def forward(
        self, x: torch.Tensor, targets: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        first, second, last = self.norms
        if self.fused:
            mixed = self.attention(ds_ops.rms_norm(x, first), cos, sin)
            normal, x = ds_ops.rms_norm(mixed, second, residual=x)
            more = self.down(ds_ops.swiglu(self.up(normal)))
            normal, _ = ds_ops.rms_norm(more, last, residual=x)
            return ds_ops.linear_cross_entropy(normal, self.head, targets)
        d = x.shape[-1:]
        x = x + self.attention(F.rms_norm(x, d, first, 1e-6), cos, sin)
        gate, up = self.up(F.rms_norm(x, d, second, 1e-6)).chunk(2, -1)
        x = x + self.down(F.silu(gate) * up)
        logits = F.linear(F.rms_norm(x, d, last, 1e-6), self.head)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _plain_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((a * c - b * s, b * c + a * s), -1)


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_equals_plain_torch(compiled: bool) -> None:
    tables = rope_tables(torch.arange(12), 8)
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        block = Block(fused)
        x = torch.randn(2, 12, 32, requires_grad=True)
        step = block
        if fused and compiled:
            step = torch.compile(block, fullgraph=True, backend="aot_eager")  # type: ignore[assignment]
        loss = step(x, torch.randint(0, 50, (2, 12)), *tables)
        loss.backward()
        found.append([loss.detach(), x.grad, *(p.grad for p in block.parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
