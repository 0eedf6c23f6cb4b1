"""Norms, rotary embedding, gated activations and losses, forward and backward.

The floor of a row is the traffic of an op that keeps nothing but its inputs, and the first touch of
as much memory as its results are: torch allocates them anew, and above 32 MiB each then consists of
pages that the system hands out at that touch. The floor asks for large pages there, as ds-ops does;
torch's own results, made of small ones, take longer to touch than to compute.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ds_ops
from ds_core.ops.checking import relative
from ds_core.ops.rope import rope_tables
from ds_ops.bench import timing
from ds_ops.bench.floors import matmul_floor, stream_floor

Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """An op at one size.

    Attributes:
        ours, plain: the same function, by ds-ops and by torch.
        inputs: what it takes and is differentiated by.
        reads, writes: how many tensors of the first input's size forward and backward move.
    """

    op: str
    shape: str
    ours: Function
    plain: Function
    inputs: Sequence[torch.Tensor]
    reads: int
    writes: int


def rows(seconds: float) -> Iterator[timing.Row]:
    """Forward and backward of each op, against torch and against torch.compile of the same."""
    for dtype in (torch.float32, torch.bfloat16):
        for make in (_rms_norm, _layer_norm, _swiglu, _rope, _cross_entropy):
            yield from _measured(make(dtype), dtype, seconds)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _linear_cross_entropy(dtype, seconds)
        yield from _block(dtype, seconds)


def _measured(case: Case, dtype: torch.dtype, seconds: float) -> Iterator[timing.Row]:
    torch._dynamo.reset()
    compiled = torch.compile(case.plain, dynamic=False)
    inputs = [t.requires_grad_() for t in case.inputs]
    first = case.inputs[0].detach()
    grad = torch.ones_like(case.plain(*inputs))
    room = [torch.empty_like(first) for _ in range(case.writes)]
    sources = [torch.empty_like(first).fill_(1) for _ in range(case.reads)]
    found = timing.interleave(
        {
            "ours": _step(case.ours, inputs, grad),
            "torch": _step(case.plain, inputs, grad),
            "torch.compile": _step(compiled, inputs, grad),
            "floor": _floor(sources, room),
        },
        seconds=seconds,
    )
    error = _error(case, inputs)
    # torch's own layer norm is fused.
    for peer, least in (("torch", 1.0 if case.op == "layer_norm" else 1.5), ("torch.compile", 1.0)):
        yield timing.row(
            f"{case.op} fwd+bwd", case.shape, dtype, found, peer=peer, error=error, min_x_peer=least
        )


def _floor(sources: list[torch.Tensor], room: list[torch.Tensor]) -> Callable[[], None]:
    """Read the sources, write the room, and touch every page of as much new memory."""
    stream = stream_floor(sources, room)

    def floor() -> None:
        stream()
        for t in room:
            _fresh(t.nbytes)[::4096].zero_()

    return floor


def _fresh(nbytes: int) -> torch.Tensor:
    """Memory for a result, with large pages where malloc would ask the system for new ones."""
    if nbytes < 32 << 20:
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _step(function: Function, inputs: list[torch.Tensor], grad: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        torch.autograd.grad(function(*inputs), inputs, grad)

    return step


def _error(case: Case, inputs: list[torch.Tensor]) -> float:
    """Of the result, against plain torch in float64, on a part of the rows."""
    few = [t.detach()[:64] if t.dim() > 1 else t.detach() for t in inputs]
    if case.op == "cross_entropy":
        few = [t.detach() for t in inputs]
    with torch.no_grad():
        return relative(case.ours(*few), case.plain(*(t.double() for t in few)))


def _rms_norm(dtype: torch.dtype) -> Case:
    x, weight = torch.randn(2048, 4096).to(dtype), torch.rand(4096).to(dtype)

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    return Case("rms_norm", "2048x4096", ds_ops.rms_norm, plain, (x, weight), 3, 2)


def _layer_norm(dtype: torch.dtype) -> Case:
    x, weight, bias = (torch.rand(*shape).to(dtype) for shape in ((2048, 4096), (4096,), (4096,)))

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    return Case("layer_norm", "2048x4096", ds_ops.layer_norm, plain, (x, weight, bias), 3, 2)


def _swiglu(dtype: torch.dtype) -> Case:
    gate, up = (torch.randn(2048, 11008).to(dtype) for _ in range(2))

    def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    return Case("swiglu", "2048x11008", ds_ops.swiglu, plain, (gate, up), 5, 3)


def _rope(dtype: torch.dtype) -> Case:
    x = torch.randn(2, 1024, 32, 128).to(dtype)
    cos, sin = rope_tables(torch.arange(1024), 128)
    wide_cos, wide_sin = (torch.cat((t, t), -1).to(dtype)[None, :, None] for t in (cos, sin))

    def plain(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * wide_cos + torch.cat((-b, a), -1) * wide_sin

    def ours(x: torch.Tensor) -> torch.Tensor:
        return ds_ops.rope(x, cos, sin)

    return Case("rope", "b2 s1024 h32 d128", ours, plain, (x,), 2, 2)


def _cross_entropy(dtype: torch.dtype) -> Case:
    logits, targets = torch.randn(2048, 32000).to(dtype), torch.randint(0, 32000, (2048,))

    def plain(logits: torch.Tensor) -> torch.Tensor:
        # As models do: a softmax over bf16 logits is taken in fp32.
        wide = logits.float() if logits.dtype is torch.bfloat16 else logits
        return F.cross_entropy(wide, targets)

    def ours(logits: torch.Tensor) -> torch.Tensor:
        return ds_ops.cross_entropy(logits, targets)

    return Case("cross_entropy", "2048x32000", ours, plain, (logits,), 1, 1)


def _linear_cross_entropy(dtype: torch.dtype, seconds: float) -> Iterator[timing.Row]:
    """The floor: its three matrix products, all tokens at once."""
    tokens, d, classes = 2048, 1024, 32000
    hidden = torch.randn(tokens, d).to(dtype).requires_grad_()
    weight = (torch.randn(classes, d) * 0.03).to(dtype).requires_grad_()
    targets = torch.randint(0, classes, (tokens,))
    one = torch.ones(())

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def ours(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ds_ops.linear_cross_entropy(hidden, weight, targets)

    products = [matmul_floor(tokens, d, classes, dtype), matmul_floor(tokens, classes, d, dtype)]
    products.append(matmul_floor(classes, tokens, d, dtype))
    candidates = {
        "ours": _step(ours, [hidden, weight], one),
        "linear, cross_entropy": _step(plain, [hidden, weight], one),
        "floor": lambda: [product() for product in products],
    }
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        options = torch.nn.LinearCrossEntropyOptions()

        def chunked(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = F.linear_cross_entropy(hidden, weight, targets, options=options)
            return found

        candidates["F.linear_cross_entropy"] = _step(chunked, [hidden, weight], one)
    found = timing.interleave(candidates, seconds=seconds, min_rounds=3)
    shape = f"{tokens} d{d} {classes}"
    for peer in list(candidates)[1:]:
        if peer != "floor":
            yield timing.row("linear_cross_entropy", shape, dtype, found, peer=peer, min_x_peer=1.0)


class Block(torch.nn.Module):
    """A block as of Llama; its norms, rotation and activation of ds-ops, or of torch."""

    def __init__(self, fused: bool, d: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.fused, self.heads = fused, heads
        self.norms = torch.nn.ParameterList(torch.ones(d) for _ in range(2))
        self.qkv = torch.nn.Linear(d, 3 * d, bias=False)
        self.out = torch.nn.Linear(d, d, bias=False)
        self.up = torch.nn.Linear(d, 2 * ffn, bias=False)
        self.down = torch.nn.Linear(ffn, d, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x `[batch, seq, d]`; returns the same."""
        first, second = self.norms
        width = x.shape[-1:]
        if self.fused:
            mixed = self._attention(ds_ops.rms_norm(x, first), cos, sin)
            normal, x = ds_ops.rms_norm(mixed, second, residual=x)
            return x + self.down(ds_ops.swiglu(self.up(normal)))
        x = x + self._attention(F.rms_norm(x, width, first, 1e-6), cos, sin)
        gate, up = self.up(F.rms_norm(x, width, second, 1e-6)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def _attention(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, d = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).unbind(2)
        rotate = ds_ops.rope if self.fused else _plain_rope
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, d))
        return found


def _plain_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    c, s = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def _block(dtype: torch.dtype, seconds: float) -> Iterator[timing.Row]:
    """A forward and backward of one block; what is left are torch's matrix products."""
    length, d, heads = 512, 1024, 16
    tables = rope_tables(torch.arange(length), d // heads)
    blocks = {name: Block(name == "ours", d, heads, 2816).to(dtype) for name in ("ours", "torch")}
    blocks["ours"].load_state_dict(blocks["torch"].state_dict())
    x = torch.randn(2, length, d).to(dtype).requires_grad_()
    grad = torch.ones_like(x)

    def step(block: Block) -> Callable[[], None]:
        return _step(lambda *leaves: block(x, *tables), [x, *block.parameters()], grad)

    candidates = {name: step(block) for name, block in blocks.items()}
    found = timing.interleave(candidates, seconds=seconds, min_rounds=3)
    with torch.no_grad():
        error = relative(blocks["ours"](x, *tables), blocks["torch"](x, *tables))
    yield timing.row(
        "llama block fwd+bwd",
        "b2 s512 d1024",
        dtype,
        found,
        peer="torch",
        error=error,
        note="error: from torch's block",
    )


if __name__ == "__main__":
    timing.main(rows)
