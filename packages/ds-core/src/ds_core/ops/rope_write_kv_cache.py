"""Rotating new queries and keys, and writing keys and values into a cache of blocks, in one pass.

Source: Su et al. 2021, equation 34 (rotation); Kwon et al. 2023 (blocks).
"""

from __future__ import annotations

from typing import Any

import torch

from ds_core.ops import kv_cache, rope
from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_shape,
    expect_tensors,
    expect_together,
    randn,
)
from ds_core.ops.kv_cache import FP8
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Floor, Op

NAME = "rope_write_kv_cache_"


def rope_write_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    interleaved: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Rotate q in place, and write rotated k, and v, into their slots of the caches.

    What `rope` of q and of k and then `write_kv_cache` do, with each number read and written once.

    Args:
        q: `[tokens, heads, d]`, fp32, bf16 or fp16; changed. May be a slice of a larger tensor,
            such as q, k and v in one, whose last dimension is contiguous.
        k, v: `[tokens, kv_heads, d]`, q's dtype; not changed. May be slices as q; kv_heads may be
            any number.
        cos, sin: `[places, r / 2]`, any float dtype, as `rope_tables` makes them for the positions
            from 0 on; r <= d. Elements of a head behind the first r are not rotated.
        positions: `[tokens]`, int64: the row of cos and sin of each token.
        k_cache, v_cache, slots, k_scale, v_scale: as `write_kv_cache` takes them. The q of a token
            with slot -1 is rotated, too.
        interleaved: pairs are neighbours (GPT-J), not r / 2 apart (NeoX, Llama).

    The rotated k is rounded to its dtype before it becomes an 8-bit float.

    Raises OpError or RuntimeError for shapes, dtypes, positions or slots that do not fit; then
    nothing is written. On a GPU positions and slots are not looked at: a position that has no row
    makes NaN of the token's q and k, and for slots see `write_kv_cache`.
    """
    expect_tensors(NAME, q=q, k=k, v=v, cos=cos, sin=sin, positions=positions)
    expect_tensors(NAME, k_cache=k_cache, v_cache=v_cache, slots=slots)
    cos, sin = cos.contiguous(), sin.contiguous()
    tables = (cos, sin, positions)
    run(NAME, q, k, v, *tables, k_cache, v_cache, slots, interleaved, k_scale, v_scale)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    interleaved: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """`rope` of k, `write_kv_cache` of that and of v, and `rope` of q."""
    check(q, k, v, cos, sin, positions, k_cache, v_cache, slots, k_scale, v_scale)
    check_positions(positions, cos)
    turn = (cos[positions], sin[positions], False, interleaved, False)
    turned = rope.reference(k.unsqueeze(0), *turn).squeeze(0)
    kv_cache.reference(turned, v, k_cache, v_cache, slots, k_scale, v_scale)
    rope.in_place_reference(q.unsqueeze(0), *turn)


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Raise OpError unless shapes and dtypes fit; looks at no value."""
    expect_float(NAME, "q", q)
    expect(q.dim() == 3, NAME, "q", f"shape {list(q.shape)}", "[tokens, heads, head size]")
    fits = k.dim() == 3 and k.shape[0] == q.shape[0] and k.shape[2] == q.shape[2]
    wanted = f"[{q.shape[0]}, kv_heads, {q.shape[2]}]"
    expect(fits, NAME, "k", f"shape {list(k.shape)}", wanted)
    expect(k.dtype == q.dtype, NAME, "k", k.dtype, q.dtype)
    kv_cache.check(NAME, k, v, k_cache, v_cache, slots, k_scale, v_scale)
    for name, table in (("cos", cos), ("sin", sin)):
        expect_float(NAME, name, table)
        fits = table.dim() == 2 and 2 * table.shape[1] <= q.shape[2]
        wanted = f"[places, pairs] with 2 * pairs <= {q.shape[2]}"
        expect(fits, NAME, name, f"shape {list(table.shape)}", wanted)
    expect_shape(NAME, "sin", sin, cos.shape)
    expect(positions.dtype is torch.int64, NAME, "positions", positions.dtype, torch.int64)
    expect_shape(NAME, "positions", positions, q.shape[:1])
    expect_together(NAME, q, k=k, cos=cos, sin=sin, positions=positions)


def check_positions(positions: torch.Tensor, cos: torch.Tensor) -> None:
    """Raise OpError unless each position has a row in the tables; looks at values."""
    wrong = positions[(positions < 0) | (positions >= cos.shape[0])]
    told = f"0 to {cos.shape[0] - 1}, the rows of cos"
    expect(wrong.numel() == 0, NAME, "positions", wrong[:1].tolist(), told)


def fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    interleaved: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    check(q, k, v, cos, sin, positions, k_cache, v_cache, slots, k_scale, v_scale)


def example(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    heads: tuple[int, int],
    head_size: int,
    rotary: int,
    block_size: int = 5,
    kind: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """Tensors for a call, up to slots; q, k and v are slices of one. Some tokens are skipped."""
    both = randn(device, dtype, tokens, heads[0] + 2 * heads[1], head_size)
    q, k, v = both.split((heads[0], heads[1], heads[1]), 1)
    generator = torch.Generator().manual_seed(tokens)
    blocks = tokens // block_size + 2
    places = 2 * tokens + 3
    tables = rope.rope_tables(torch.arange(places, device=device), rotary)
    positions = torch.randint(places, (tokens,), generator=generator).to(device)
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens].to(device)
    slots[1::3] = -1
    caches = (
        randn(device, torch.float32, blocks, block_size, heads[1], head_size, seed=seed)
        .to(kind or dtype)
        for seed in (1, 2)
    )  # fmt: skip
    return (q.clone(), k, v, *tables, positions, *caches, slots)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Both kinds of pairs; part of a head; any ratio of heads; slices; 8-bit floats; no token."""

    def made(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return example(device, dtype, *args, **kwargs)

    q, *others = made(4, (3, 3), 40, 40)
    inside = torch.cat((q, q), 1)[:, 1:4]
    one = torch.tensor([0.6], device=device)
    per_head = torch.tensor([0.4, 0.9], device=device)
    return [
        (*made(7, (4, 2), 64, 64), False),
        (*made(7, (4, 2), 64, 64), True),
        (inside, *others, False),
        (*made(3, (10, 2), 80, 20), False),
        (*made(3, (5, 1), 24, 6), True),
        (*made(1, (1, 4), 10, 2, 1), False),
        (*made(0, (2, 2), 16, 16), False),
        (*made(6, (4, 2), 64, 32, kind=FP8[0]), False, one, per_head),
        (*made(6, (4, 2), 64, 64, kind=FP8[1]), True, per_head, None),
        (*made(2, (2, 2), 192, 192), False),
    ]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    names = ("q", "k", "v", "cos", "sin", "positions", "k_cache", "v_cache", "slots")
    plain = dict(
        zip(names, example(device, torch.float32, 4, (4, 2), 16, 16), strict=True),
    )
    cos, positions, slots = plain["cos"], plain["positions"], plain["slots"]

    def call(*rest: Any, **changed: torch.Tensor) -> tuple[Any, ...]:
        return (*(plain | changed).values(), False, *rest)

    values: list[tuple[str, tuple[Any, ...]]] = []
    if device.type == "cpu":  # which alone is looked at
        values = [
            ("positions: got .*11.*0 to 10", call(positions=positions * 0 + 11)),
            ("positions: got .*-1.*0 to 10", call(positions=positions * 0 - 1)),
            ("slots: got .*99.*0 to 9", call(slots=slots * 0 + 99)),
            ("slots: got .*each slot once", call(slots=slots * 0 + 1)),
        ]
    one = torch.ones(1, device=device)
    return [
        *values,
        ("q: got torch.int64", call(q=plain["q"].long())),
        ("q: got shape", call(q=plain["q"][0])),
        ("k: got shape", call(k=plain["k"][:2])),
        ("k: got torch.float16", call(k=plain["k"].half())),
        ("v: got shape", call(v=plain["v"][..., :8])),
        ("cos: got shape", call(cos=cos[0])),
        ("cos: got shape", call(cos=torch.ones(11, 9, device=device))),
        ("sin: got shape", call(sin=cos[:3])),
        ("positions: got torch.int32", call(positions=positions.int())),
        ("positions: got shape", call(positions=positions[:2])),
        ("k_cache: got torch.float16", call(k_cache=plain["k_cache"].half())),
        ("slots: got torch.int32", call(slots=slots.int())),
        ("k_scale: got .*only fp8", call(one)),
    ]


def floor(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    interleaved: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> Floor:
    tables = 2 * positions.numel() * cos.shape[1] * cos.element_size()
    read = sum(t.numel() * t.element_size() for t in (q, k, v, positions, slots))
    cached = (k.numel() + v.numel()) * k_cache.element_size()
    return Floor(read + tables, q.numel() * q.element_size() + cached, 3 * (q.numel() + k.numel()))


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    """A prefill of 4096 tokens, and a decode of 256, of a model with 32 and 8 heads of 128."""
    return [
        (
            f"{tokens} tokens, heads 32/8 of 128, {str(kind)[6:]}",
            (*example(device, torch.bfloat16, tokens, (32, 8), 128, 128, 16, kind), False),
        )
        for tokens in (4096, 256)
        for kind in (torch.bfloat16, FP8[0])
    ]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor(a!) q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, "
        "Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor slots, bool interleaved=False, "
        "Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        # Of 8-bit floats: a number next to the middle of two may become either.
        tolerance={**CLASS, **dict.fromkeys(FP8, 1e-2)},
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
    ),
)
