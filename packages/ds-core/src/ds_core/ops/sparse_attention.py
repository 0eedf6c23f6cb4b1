"""Attention over the blocks of a layout: `block_sparse_attention`, its reference and gradient.

Sources: Child et al. 2019 (attention by blocks); Milakov and Gimelshein 2018 and Dao et al. 2023
(softmax in one pass, and its gradient from the sums of exponentials).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ds_core.errors import OpError
from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_shape,
    expect_together,
    randn,
    unaligned,
    wide,
    wide_dtype,
)
from ds_core.ops.block_layout import BlockLayout
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

NAME = "sparse_attention"
BACKWARD = "sparse_attention_backward"
#: How a mask is used: its numbers are added to the scores, or keys where it is 0 are not seen.
MODES = ("add", "mul")


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    rpe: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    key_padding_mask_mode: str = "add",
    attn_mask_mode: str = "mul",
) -> torch.Tensor:
    """`softmax(scale * q k^T + rpe + masks) v` over the blocks of a layout, computed in fp32.

    Time and memory are those of the blocks that there are. Queries that see no key get zeros.

    Args:
        q, k, v: `[batch, heads, tokens, d]`, one dtype: fp32, bf16 or fp16; any strides, but views
            whose strides differ are copied. Kernels on GPUs take d up to 128.
        layout: for so many tokens, with one head or as many as q.
        scale: of the scores; None: `1 / sqrt(d)`.
        rpe: added to the scaled scores; broadcast to `[batch, heads, tokens, tokens]`, float.
        key_padding_mask: `[batch, tokens]`, of keys; float, or bool for "mul".
        attn_mask: `[tokens, tokens]`, of pairs; float, or bool for "mul".
        key_padding_mask_mode, attn_mask_mode: "add": the mask is added to the scores; "mul": what
            is 0 (False) is not seen, all else is.

    Returns q's shape and dtype, the same bit for bit in every run. Differentiable in q, k and v;
    not in rpe and the masks, which raise if they want a gradient.

    Raises OpError for shapes, dtypes, modes or devices that do not fit.
    """
    for name, t in (("rpe", rpe), ("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise OpError(
                f"{NAME}: {name}: it requires a gradient, which is not computed: give "
                f"{name}.detach(), or use torch.nn.attention.flex_attention"
            )
    multiplied = []
    for name, mode in (("key_padding_mask", key_padding_mask_mode), ("attn_mask", attn_mask_mode)):
        expect(mode in MODES, NAME, f"{name}_mode", mode, " or ".join(MODES))
        multiplied.append(mode == "mul")
    if rpe is not None:
        expect(rpe.dim() <= 4, NAME, "rpe", f"shape {list(rpe.shape)}", "four dimensions at most")
        rpe = rpe[(None,) * (4 - rpe.dim())]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out: torch.Tensor = run(
        NAME,
        *(q, k, v, *layout.on(q.device), layout.block, layout.causal, scale, rpe),
        *(_plain(key_padding_mask, multiplied[0], q), _plain(attn_mask, multiplied[1], q)),
        *multiplied,
    )[0]
    return out


def _plain(mask: torch.Tensor | None, multiplied: bool, q: torch.Tensor) -> torch.Tensor | None:
    """A mask as the op takes it: numbers that lie side by side."""
    if mask is None:
        return None
    if mask.dtype is torch.bool and multiplied:
        mask = mask.to(q.dtype)
    return mask if mask.stride(-1) == 1 else mask.contiguous()


@dataclass(frozen=True)
class Options:
    """The arguments of the op behind q, k and v; the same in both directions.

    Attributes:
        blocks: `[1 or heads, n, n]`, bool.
        rows, columns: of the `BlockLayout`, for kernels.
        block, causal: of the `BlockLayout`.
        scale: of the scores.
        rpe: `[1 or batch, 1 or heads, tokens, tokens]`.
        key_padding_mask: `[batch, tokens]`.
        attn_mask: `[tokens, tokens]`.
        key_mul, pair_mul: whether a mask says which keys are seen; else it is added.
    """

    blocks: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    block: int
    causal: bool
    scale: float
    rpe: torch.Tensor | None = None
    key_padding_mask: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None
    key_mul: bool = False
    pair_mul: bool = False

    def check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Raise OpError unless everything fits q, k and v."""
        expect_float(NAME, "q", q)
        expect(q.dim() == 4, NAME, "q", f"shape {list(q.shape)}", "[batch, heads, tokens, d]")
        for name, t in (("k", k), ("v", v)):
            expect(t.dtype == q.dtype, NAME, name, t.dtype, q.dtype)
            expect_shape(NAME, name, t, q.shape)
        batch, heads, tokens, d = q.shape
        expect(d > 0, NAME, "q", "heads of 0", "1 or more")
        self._check_layout(heads, tokens)
        expect(math.isfinite(self.scale), NAME, "scale", self.scale, "a finite number")
        self._check_floats(q)
        if self.rpe is not None:
            full = (batch, heads, tokens, tokens)
            fits = self.rpe.dim() == 4 and self.rpe.shape[2:] == full[2:]
            fits = fits and all(n in (1, m) for n, m in zip(self.rpe.shape, full, strict=True))
            wanted = f"what broadcasts to {list(full)}"
            expect(fits, NAME, "rpe", f"shape {list(self.rpe.shape)}", wanted)
        if self.key_padding_mask is not None:
            expect_shape(NAME, "key_padding_mask", self.key_padding_mask, (batch, tokens))
        if self.attn_mask is not None:
            expect_shape(NAME, "attn_mask", self.attn_mask, (tokens, tokens))
        expect_together(
            *(NAME, q), k=k, v=v, layout=self.blocks, rpe=self.rpe,
            key_padding_mask=self.key_padding_mask, attn_mask=self.attn_mask,
        )  # fmt: skip

    def _check_layout(self, heads: int, tokens: int) -> None:
        own, count = self.blocks.shape[0], self.blocks.shape[-1]
        expect(self.blocks.dtype is torch.bool, NAME, "layout", self.blocks.dtype, "torch.bool")
        expect(own in (1, heads), NAME, "layout", f"{own} heads", f"1 or q's {heads}")
        fits = self.blocks.dim() == 3 and count * self.block == tokens
        given = f"{count} blocks of {self.block}, {count * self.block} tokens"
        expect(fits, NAME, "layout", given, f"blocks that make up q's {tokens} tokens")

    def _check_floats(self, q: torch.Tensor) -> None:
        allowed = (q.dtype, torch.float32)
        for name in ("rpe", "key_padding_mask", "attn_mask"):
            t: torch.Tensor | None = getattr(self, name)
            if t is not None:
                expect(t.dtype in allowed, NAME, name, t.dtype, f"{q.dtype} or torch.float32")

    def seen(self) -> torch.Tensor:
        """Which keys each query sees by the layout, `[1 or heads, tokens, tokens]`, bool."""
        found = self.blocks.repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)
        return found.tril() if self.causal else found

    def added(self) -> list[torch.Tensor]:
        """What is added to the scores, each broadcast to `[batch, heads, tokens, tokens]`."""
        found = [] if self.rpe is None else [wide(self.rpe.detach())]
        for mask, multiplied, lead in (
            (self.key_padding_mask, self.key_mul, (slice(None), None, None)),
            (self.attn_mask, self.pair_mul, (None, None)),
        ):
            if mask is not None:
                number = wide(mask.detach())[lead]
                zeros = torch.zeros_like(number)
                found.append(zeros.masked_fill(number == 0, -torch.inf) if multiplied else number)
        return found


def _scores(q: torch.Tensor, k: torch.Tensor, options: Options) -> torch.Tensor:
    scores = wide(q) @ wide(k).transpose(2, 3) * options.scale
    for term in options.added():
        scores = scores + term
    return scores.masked_fill(~options.seen(), -torch.inf)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `block_sparse_attention`, with all scores in memory: the result, and `lse`.

    `lse`: `[batch, heads, tokens]`, fp32, the logarithm of the sum of the exponentials of each
    query's scores; -inf, and a result of 0, for a query that sees no key. The arguments behind v
    are those of `Options`.
    """
    options = Options(*rest)
    options.check(q, k, v)
    scores = _scores(q, k, options)
    alone = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(alone, 0.0).softmax(-1).masked_fill(alone, 0.0)
    return _empty_like(q).copy_(weights @ wide(v)), scores.detach().logsumexp(-1)


def backward_reference(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from the result, its gradient and `lse`: with P the weights,

    `dV = P^T dO`, `dS = P * (dO V^T - sum(dO * O))`, `dQ = scale * dS K`, `dK = scale * dS^T Q`.
    """
    options = Options(*rest)
    _check_backward(grad, q, k, v, out, lse, options)
    wide_grad = wide(grad)
    hidden = lse == -torch.inf
    weights = torch.exp(_scores(q, k, options) - lse.masked_fill(hidden, 0.0)[..., None])
    delta = (wide_grad * wide(out)).sum(-1, keepdim=True)
    ds = weights * (wide_grad @ wide(v).transpose(2, 3) - delta) * options.scale
    found = (ds @ wide(k), ds.transpose(2, 3) @ wide(q), weights.transpose(2, 3) @ wide_grad)
    dq, dk, dv = (_empty_like(q).copy_(t) for t in found)
    return dq, dk, dv


def _check_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
) -> None:
    options.check(q, k, v)
    for name, t in (("grad", grad), ("out", out)):
        expect_shape(BACKWARD, name, t, q.shape)
        expect(t.dtype == q.dtype, BACKWARD, name, t.dtype, q.dtype)
    expect_shape(BACKWARD, "lse", lse, q.shape[:-1])
    expect_together(BACKWARD, q, grad=grad, out=out, lse=lse)


def fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    Options(*rest).check(q, k, v)
    return _empty_like(q), q.new_empty(q.shape[:-1], dtype=wide_dtype(q.dtype))


def backward_fake(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_backward(grad, q, k, v, out, lse, Options(*rest))
    return _empty_like(q), _empty_like(q), _empty_like(q)


def _empty_like(q: torch.Tensor) -> torch.Tensor:
    """A result: it lies as q does in memory, but always with rows whose numbers are together."""
    return torch.empty_like(q) if q.stride(3) == 1 else q.new_empty(q.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, *rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    kept = [value for value in rest if isinstance(value, torch.Tensor)]
    ctx.options = [None if isinstance(value, torch.Tensor) else value for value in rest]
    ctx.places = [i for i, value in enumerate(rest) if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(q, k, v, *output, *kept)


def _backward(call: Callable[..., Any], ctx: Any, grad: torch.Tensor | None, _: Any) -> Any:
    q, k, v, out, lse, *kept = ctx.saved_tensors
    rest = list(ctx.options)
    if grad is None:
        return (None,) * (3 + len(rest))
    for place, tensor in zip(ctx.places, kept, strict=True):
        rest[place] = tensor
    found = call(BACKWARD, grad, q, k, v, out, lse, *rest)
    return (*found, *(None for _ in rest))


# --- Cases, refusals, floor -----------------------------------------------------------------------


def pattern(blocks: int, heads: int = 1) -> torch.Tensor:
    """A layout of windows, a global column and row, a block far off, and a row without any."""
    place = torch.arange(blocks)
    found = torch.stack([(place[:, None] - place).abs() <= (head + 1) % 3 for head in range(heads)])
    found[:, :, 0] = True
    found[:, blocks // 2] = True
    found[:, -1, blocks // 3] = True
    if blocks > 3:
        found[-1, 1] = False
    return found


def example(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    layout: BlockLayout,
    *,
    rpe: tuple[int, int] | None = None,
    key_mask: str = "",
    pair_mask: str = "",
) -> tuple[Any, ...]:
    """The op's arguments for q of a shape; rpe: its batch and heads; masks: "add" or "mul"."""
    batch, _, tokens, d = shape
    q, k, v = (randn(device, dtype, *shape, seed=seed) for seed in range(3))
    bias = randn(device, dtype, *rpe, tokens, tokens, seed=3) if rpe else None
    keys = pairs = None
    if key_mask:
        keys = randn(device, dtype, batch, tokens, seed=4)
        keys = keys.masked_fill(keys > 0.7, -torch.inf if key_mask == "add" else 0.0)
    if pair_mask:
        pairs = randn(device, dtype, tokens, tokens, seed=5)
        pairs = pairs.masked_fill(pairs > 0.7, -torch.inf if pair_mask == "add" else 0.0)
        pairs[tokens // 2] = -torch.inf if pair_mask == "add" else 0.0  # a query without any key
    return (
        *(q, k, v, *layout.on(device), layout.block, layout.causal, 1 / math.sqrt(d), bias),
        *(keys, pairs, key_mask == "mul", pair_mask == "mul"),
    )


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Blocks of each kind, with and without masks; odd, single and empty sizes; views."""
    made = [
        example(device, dtype, (1, 2, 176, 16), BlockLayout(pattern(11, 2), 16)),
        example(
            *(device, dtype, (2, 2, 80, 24), BlockLayout(pattern(5), 16, causal=True)),
            rpe=(1, 2), key_mask="add", pair_mask="mul",
        ),
        example(device, dtype, (1, 1, 160, 16), BlockLayout(pattern(5), 32), key_mask="mul"),
        example(
            *(device, dtype, (1, 2, 192, 32), BlockLayout(pattern(3), 64)), rpe=(1, 1),
            pair_mask="add",
        ),
        example(device, dtype, (1, 1, 128, 16), BlockLayout(pattern(2), 64, causal=True)),
        example(device, dtype, (1, 2, 128, 16), BlockLayout(pattern(1), 128)),
        example(device, dtype, (0, 2, 32, 16), BlockLayout(pattern(2), 16)),
    ]  # fmt: skip
    q, k, v, *rest = example(device, dtype, (2, 2, 16, 16), BlockLayout(pattern(1), 16))
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    upright = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    return [*made, (*turned, *rest), (*upright, *rest), (unaligned(q), turned[1], v, *rest)]


def backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found = []
    for args in cases(device, dtype):
        out, lse = reference(*args)
        found.append((randn(device, dtype, *out.shape, seed=7), *args[:3], out, lse, *args[3:]))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    layout = BlockLayout(pattern(2), 16)
    args = example(device, torch.float32, (2, 2, 32, 8), layout)
    q, k, v, blocks, *rest = args
    scale = rest[4]
    square = torch.zeros(32, 32, device=device)

    def masked(*masks: torch.Tensor | None) -> tuple[Any, ...]:
        return (*args[:9], *masks, False, False)

    return [
        ("q: got torch.int64", (q.long(), k, v, blocks, *rest)),
        (r"q: got shape \[2, 32, 8\]", (q[0], k, v, blocks, *rest)),
        ("k: got shape", (q, k[:, :1], v, blocks, *rest)),
        ("v: got torch.float16", (q, k, v.half(), blocks, *rest)),
        ("layout: got 3 heads, expected 1 or q's 2", (q, k, v, blocks.expand(3, 2, 2), *rest)),
        ("layout: got torch.int64", (q, k, v, blocks.long(), *rest)),
        ("2 blocks of 32, 64 tokens", (q, k, v, blocks, *rest[:2], 32, False, scale)),
        ("scale: got nan", (q, k, v, blocks, *rest[:3], False, math.nan)),
        ("rpe: got shape", masked(square[None, None, :, :31], None, None)),
        ("rpe: got torch.float16", masked(square.half()[None, None], None, None)),
        ("key_padding_mask: got shape", masked(None, square, None)),
        ("attn_mask: got shape", masked(None, None, square[:2])),
        ("attn_mask: got torch.bool", masked(None, None, square.bool())),
    ]


def floor(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Floor:
    return _floor(q, Options(*rest), read=3, written=1, products=2)


def backward_floor(grad: torch.Tensor, q: torch.Tensor, *others: Any) -> Floor:
    return _floor(q, Options(*others[4:]), read=5, written=3, products=5)


def _floor(q: torch.Tensor, options: Options, read: int, written: int, products: int) -> Floor:
    """Bytes of so many tensors, and products of matrices over the blocks that there are."""
    batch, heads, _, d = q.shape
    there = int(options.blocks.sum()) * (heads // options.blocks.shape[0])
    flops = products * 2 * batch * there * options.block**2 * d
    return Floor(read * q.nbytes, written * q.nbytes, flops)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for block, dtype in ((64, torch.float32), (64, torch.bfloat16), (16, torch.bfloat16)):
        layout = BlockLayout(pattern(2048 // block), block)
        args = example(device, dtype, (1, 4, 2048, 64), layout)
        found.append((f"1x4x2048x64 blocks of {block} {str(dtype)[6:]}", args))
    return found


def backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found = []
    for label, args in benchmarks(device)[1:2]:
        out, lse = reference(*args)
        grad = randn(device, out.dtype, *out.shape, seed=7)
        found.append((label, (grad, *args[:3], out, lse, *args[3:])))
    return found


_OPTIONS = (
    "Tensor blocks, Tensor rows, Tensor columns, int block, bool causal, float scale, "
    "Tensor? rpe=None, Tensor? key_padding_mask=None, Tensor? attn_mask=None, "
    "bool key_mul=False, bool pair_mul=False)"
)

OPS = (
    Op(
        name=NAME,
        schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS} -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
        autograd=Autograd(_setup, _backward),
    ),
    Op(
        name=BACKWARD,
        schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_OPTIONS} -> (Tensor, Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=backward_cases,
        refused=lambda device: [],
        floor=backward_floor,
        benchmarks=backward_benchmarks,
    ),
)
