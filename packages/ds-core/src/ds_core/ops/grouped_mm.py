"""One matrix product per expert, of rows that are sorted by expert: the linear layers of an MoE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_tensors,
    expect_together,
    randn,
    wide,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

NAME = "grouped_mm"


def grouped_mm(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`a[offsets[e - 1] : offsets[e]] @ b[e]` for every expert e.

    Args:
        a: `[tokens, k]`, any float dtype, rows sorted by expert.
        b: `[experts, k, n]`, a's dtype; each expert's matrix may be a transposed one.
        offsets: `[experts]`, int32, the row behind each expert's last: never falling, of which none
            is beyond `tokens`. An expert without rows has its predecessor's. On a GPU their values
            are not looked at, which would wait for it: of wrong ones results mean nothing.

    Returns `[tokens, n]` of a's dtype, summed in fp32; rows behind the last expert's are 0.
    Differentiable in a and b. Raises OpError for shapes, dtypes or offsets that do not fit.
    """
    expect_tensors(NAME, a=a, b=b, offsets=offsets)
    out: torch.Tensor = run(NAME, a.contiguous(), b, offsets)
    return out


def reference(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """As `grouped_mm`."""
    check(a, b, offsets)
    parts, begin = [], 0
    for expert, end in enumerate(ends(NAME, offsets, len(a))):
        parts.append(wide(a[begin:end]) @ wide(b[expert]))
        begin = end
    parts.append(wide(a.new_zeros(len(a) - begin, b.shape[2])))
    return torch.cat(parts).to(a.dtype)


def backward_reference(a: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The gradient of b: `a_e^T @ grad_e` for every expert e, `[experts, k, n]`; 0 without rows."""
    check_backward(a, grad, offsets)
    parts, begin = [], 0
    for end in ends(NAME, offsets, len(a)):
        parts.append(wide(a[begin:end]).t() @ wide(grad[begin:end]))
        begin = end
    return torch.stack(parts).to(a.dtype)


def ends(op: str, offsets: torch.Tensor, rows: int) -> list[int]:
    """The offsets as integers. Raises OpError if they fall, or lie outside [0, rows]."""
    found: list[int] = offsets.tolist()
    before = 0
    for end in found:
        expect(before <= end, op, "offsets", found, "offsets that never fall, from 0 on")
        before = end
    expect(before <= rows, op, "offsets", found, f"none beyond the {rows} rows")
    return found


def check(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> None:
    """Raise OpError unless dtypes, shapes and devices fit; reads no data."""
    expect_float(NAME, "a", a)
    expect(a.dim() == 2, NAME, "a", f"shape {list(a.shape)}", "[tokens, k]")
    fits = b.dim() == 3 and b.shape[0] >= 1 and b.shape[1] == a.shape[1]
    expect(fits, NAME, "b", f"shape {list(b.shape)}", f"[experts, {a.shape[1]}, n]")
    expect(b.dtype == a.dtype, NAME, "b", b.dtype, a.dtype)
    _check_offsets(offsets, b.shape[0])
    expect_together(NAME, a, b=b, offsets=offsets)


def check_backward(a: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor) -> None:
    """As `check`, of the gradient's arguments."""
    expect_float(NAME, "a", a)
    expect(a.dim() == 2, NAME, "a", f"shape {list(a.shape)}", "[tokens, k]")
    fits = grad.dim() == 2 and grad.shape[0] == a.shape[0]
    expect(fits, NAME, "grad", f"shape {list(grad.shape)}", f"[{a.shape[0]}, n]")
    expect(grad.dtype == a.dtype, NAME, "grad", grad.dtype, a.dtype)
    _check_offsets(offsets, None)
    expect_together(NAME, a, grad=grad, offsets=offsets)


def _check_offsets(offsets: torch.Tensor, experts: int | None) -> None:
    expect(offsets.dtype == torch.int32, NAME, "offsets", offsets.dtype, torch.int32)
    fits = offsets.dim() == 1 and len(offsets) >= 1 and experts in (None, len(offsets))
    expect(fits, NAME, "offsets", f"shape {list(offsets.shape)}", [experts or "experts"])


def fake(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    check(a, b, offsets)
    return a.new_empty(a.shape[0], b.shape[2])


def backward_fake(a: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    check_backward(a, grad, offsets)
    return a.new_empty(offsets.shape[0], a.shape[1], grad.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(call: Callable[..., Any], ctx: Any, grad: torch.Tensor) -> Any:
    a, b, offsets = ctx.saved_tensors
    grad = grad.contiguous()  # torch's own kernel fails on one that is expanded
    da = call(NAME, grad, b.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    db = call("grouped_mm_backward", a, grad, offsets) if ctx.needs_input_grad[1] else None
    return da, db, None


# --- Cases, refusals, floor -----------------------------------------------------------------------

#: Rows, k, n and the offsets: rows behind the last, empty experts, one, none, sizes of all kinds.
_CASES = (
    (20, 32, 48, (5, 5, 12, 18)),
    (21, 63, 47, (0, 1, 21)),
    (70, 16, 129, (0, 66, 70, 70)),
    (1, 1, 1, (1,)),
    (3, 8, 8, (0, 0)),
    (0, 8, 8, (0, 0)),
)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Few and many rows, empty experts, rows behind the last; transposed and unaligned matrices."""
    found: list[tuple[Any, ...]] = []
    for rows, k, n, listed in _CASES:
        offsets = torch.tensor(listed, dtype=torch.int32, device=device)
        a, b = randn(device, dtype, rows, k), randn(device, dtype, len(listed), k, n, seed=3)
        found.append((a, b, offsets))
    turned = [(a, b.transpose(1, 2).contiguous().transpose(1, 2), o) for a, b, o in found[:3]]
    a, b, offsets = found[1]
    room = torch.zeros(a.numel() + 1, dtype=dtype, device=device)
    room[1:] = a.reshape(-1)
    return [*found, *turned, (room[1:].view(a.shape), b, offsets)]


def backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [
        (a, randn(device, dtype, len(a), b.shape[2], seed=5), offsets)
        for a, b, offsets in cases(device, dtype)
    ]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    a, b = torch.ones(6, 8, device=device), torch.ones(3, 8, 4, device=device)
    offsets = torch.tensor([2, 4, 6], dtype=torch.int32, device=device)
    found: list[tuple[str, tuple[Any, ...]]] = [
        ("a: got torch.int64", (a.long(), b, offsets)),
        ("a: got shape", (a[0], b, offsets)),
        ("b: got shape", (a, b[:, :7], offsets)),
        ("b: got torch.float16", (a, b.half(), offsets)),
        ("offsets: got torch.int64", (a, b, offsets.long())),
        ("offsets: got shape", (a, b, offsets[:2])),
    ]
    if device.type == "cpu":  # on a GPU nothing waits for their values
        found += [
            ("offsets that never fall", (a, b, offsets.flip(0))),
            ("offsets that never fall", (a, b, offsets - 3)),
            ("none beyond the 6 rows", (a, b, offsets + 1)),
        ]
    return found


def floor(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> Floor:
    out = a.shape[0] * b.shape[2]
    return Floor(a.nbytes + b.nbytes, out * a.element_size(), 2 * out * a.shape[1])


def backward_floor(a: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor) -> Floor:
    each = a.shape[1] * grad.shape[1]
    written = len(offsets) * each * a.element_size()
    return Floor(a.nbytes + grad.nbytes, written, 2 * a.shape[0] * each)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for rows, experts, k, n in ((2048, 8, 512, 1024), (64, 32, 1024, 1024)):
        step = rows // experts
        offsets = torch.arange(step, rows + 1, step, dtype=torch.int32, device=device)
        for dtype in (torch.float32, torch.bfloat16):
            a, b = randn(device, dtype, rows, k), randn(device, dtype, experts, k, n)
            found.append((f"{rows}x{k}x{n}/{experts} {str(dtype)[6:]}", (a, b, offsets)))
    return found


def backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    label, (a, b, offsets) = benchmarks(device)[0]
    return [(label, (a, randn(device, a.dtype, len(a), b.shape[2]), offsets))]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor a, Tensor b, Tensor offsets) -> Tensor",
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
        name="grouped_mm_backward",
        schema="(Tensor a, Tensor grad, Tensor offsets) -> Tensor",
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
