"""Rotary position embedding. Source: Su et al. 2021 (RoFormer), equation 34."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ds_core.ops.arguments import FLOATS, expect, expect_float, expect_together, randn, wide
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

NAME = "rope"


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str = "bshd",
    interleaved: bool = False,
    in_place: bool = False,
) -> torch.Tensor:
    """x with the pairs of each head rotated by the angles of their positions; of q, then of k.

    Args:
        x: `[batch, seq, heads, d]`, any float dtype; a view into a larger tensor is read as it is.
        cos, sin: `[seq, r / 2]` or `[batch, seq, r / 2]`, fp32 or any float dtype, as `rope_tables`
            makes them; r <= d. Elements behind the first r of a head are left as they are.
        layout: "bshd", or "bhsd" for x `[batch, heads, seq, d]`.
        interleaved: pairs are neighbours (GPT-J), not r / 2 apart (NeoX, Llama).
        in_place: change x itself, and return it; for inference only.

    Returns x's shape and dtype. Differentiable in x, not in the tables; the backward rotates
    back. Raises OpError for shapes or dtypes that do not fit.
    """
    expect(layout in ("bshd", "bhsd"), NAME, "layout", layout, "'bshd' or 'bhsd'")
    heads_first = layout == "bhsd"
    cos, sin = cos.contiguous(), sin.contiguous()
    if in_place:
        grad = torch.is_grad_enabled() and x.requires_grad
        expect(not grad, NAME, "in_place", "True for an x that requires grad", "False")
        run("rope_", x, cos, sin, heads_first, interleaved, False)
        return x
    if x.dim() == 4 and x.stride(-1) != 1:
        x = x.contiguous()
    result: torch.Tensor = run(NAME, x, cos, sin, heads_first, interleaved, False)
    return result


def rope_tables(
    positions: torch.Tensor, rotary_dim: int, base: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of `position * base^(-2 i / rotary_dim)`, for `rope`.

    positions: `[...]`, any real dtype. Returns two tensors `[..., rotary_dim / 2]`, fp32; angles
    are computed in float64, for in fp32 those of far positions are off by 1e-3 and more.
    """
    even = rotary_dim > 0 and rotary_dim % 2 == 0
    expect(even, "rope_tables", "rotary_dim", rotary_dim, "an even number above 0")
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double().unsqueeze(-1) * base ** (-steps / rotary_dim)
    return angles.cos().float(), angles.sin().float()


def reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads_first: bool,
    interleaved: bool,
    inverse: bool,
) -> torch.Tensor:
    """Each pair (a, b) of a head becomes `(a cos - b sin, b cos + a sin)`; inverse: with -sin.

    Pairs of the first r = 2 * cos.shape[-1] elements: (0, r/2), (1, r/2 + 1)..., interleaved:
    (0, 1), (2, 3)...
    """
    _check(x, cos, sin, heads_first)
    r = 2 * cos.shape[-1]
    c, s = (wide(t.detach()).unsqueeze(-3 if heads_first else -2) for t in (cos, sin))
    if inverse:
        s = -s
    turned, rest = wide(x[..., :r]), x[..., r:]
    pairs = turned.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    where = -1 if interleaved else -2
    a, b = pairs.unbind(where)
    rotated = torch.stack((a * c - b * s, b * c + a * s), dim=where).flatten(-2)
    # In the order of memory that x has, as every implementation returns it.
    return torch.empty_like(x).copy_(torch.cat((rotated.to(x.dtype), rest), dim=-1))


def in_place_reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads_first: bool,
    interleaved: bool,
    inverse: bool,
) -> None:
    """As `rope`, into x itself."""
    x.copy_(reference(x, cos, sin, heads_first, interleaved, inverse))


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_first: bool) -> None:
    expect_float(NAME, "x", x)
    expect(x.dim() == 4, NAME, "x", f"shape {list(x.shape)}", "4 dimensions")
    expect_together(NAME, x, cos=cos, sin=sin)
    batch, positions, width = x.shape[0], x.shape[2 if heads_first else 1], x.shape[3]
    for argument, table in (("cos", cos), ("sin", sin)):
        expect_float(NAME, argument, table)
        fits = (
            table.dim() in (2, 3)
            and table.shape[-2] == positions
            and 2 * table.shape[-1] <= width
            and (table.dim() == 2 or table.shape[0] in (1, batch))
            and table.shape == cos.shape
        )
        shapes = f"[{positions}, pairs] or [{batch}, {positions}, pairs] with 2 * pairs <= {width}"
        expect(fits, NAME, argument, f"shape {list(table.shape)}", shapes)


def fake(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads_first: bool,
    interleaved: bool,
    inverse: bool,
) -> torch.Tensor:
    _check(x, cos, sin, heads_first)
    return torch.empty_like(x)


def in_place_fake(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads_first: bool,
    interleaved: bool,
    inverse: bool,
) -> None:
    _check(x, cos, sin, heads_first)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos, sin, ctx.heads_first, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(call: Callable[..., Any], ctx: Any, grad: torch.Tensor) -> Any:
    cos, sin = ctx.saved_tensors
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    dx = call(NAME, grad, cos, sin, ctx.heads_first, ctx.interleaved, not ctx.inverse)
    return dx, None, None, None, None, None


#: batch, positions, heads, width of a head, width that is rotated
_SHAPES = ((2, 5, 3, 64, 64), (1, 7, 2, 80, 20), (2, 3, 1, 10, 6), (1, 1, 1, 2, 2), (0, 4, 2, 8, 8))


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Both layouts and kinds of pairs; part of a head; tables per sequence; views; back again."""
    found: list[tuple[Any, ...]] = []
    for batch, positions, heads, width, rotary in _SHAPES:
        table = rope_tables(torch.arange(positions, device=device), rotary)
        for interleaved in (False, True):
            x = randn(device, dtype, batch, positions, heads, width)
            found.append((x, *table, False, interleaved, False))
            x = randn(device, dtype, batch, heads, positions, width, seed=1)
            found.append((x, *table, True, interleaved, True))
    x, cos, sin = found[0][:3]
    own = rope_tables(torch.arange(10, device=device).view(2, 5) * 1000, 64)
    wider = randn(device, dtype, 2, 5, 4, 64)[:, :, 1:]
    return [
        *found,
        (x, *own, False, False, False),
        (x.transpose(1, 2), cos.to(dtype), sin.to(dtype), True, True, False),
        (wider, cos, sin, False, False, False),
    ]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 4, 3, 8, device=device)
    table = torch.ones(4, 4, device=device)
    plain = (False, False, False)
    return [
        ("x: got torch.int64", (x.long(), table, table, *plain)),
        (r"x: got shape \[4, 3, 8\]", (x[0], table, table, *plain)),
        (r"cos: got shape \[3, 4\], expected \[4, pairs\]", (x, table[:3], table, *plain)),
        (r"cos: got shape \[4, 4\], expected \[3, pairs\]", (x, table, table, True, False, False)),
        (r"sin: (got shape \[4, 3\]|has 12)", (x, table, table[:, :3].contiguous(), *plain)),
        (r"cos: got shape \[4, 5\]", (x, torch.ones(4, 5, device=device), table, *plain)),
    ]


def in_place_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [row for row in refused(device) if "int64" not in row[0]]


def floor(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads_first: bool,
    interleaved: bool,
    inverse: bool,
) -> Floor:
    return Floor(x.nbytes + cos.nbytes + sin.nbytes, x.nbytes, 6 * x.numel())


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    table = rope_tables(torch.arange(1024, device=device), 128)
    return [
        (
            f"b2 s1024 h32 d128 {str(dtype)[6:]}{' interleaved' if interleaved else ''}",
            (randn(device, dtype, 2, 1024, 32, 128), *table, False, interleaved, False),
        )
        for dtype in (torch.float32, torch.bfloat16)
        for interleaved in (False, True)
    ]


_SCHEMA = "x, Tensor cos, Tensor sin, bool heads_first, bool interleaved, bool inverse) -> "

OPS = (
    Op(
        name=NAME,
        schema=f"(Tensor {_SCHEMA}Tensor",
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
        name="rope_",
        schema=f"(Tensor(a!) {_SCHEMA}()",
        reference=in_place_reference,
        fake=in_place_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=cases,
        refused=in_place_refused,
        floor=floor,
        benchmarks=benchmarks,
    ),
)
