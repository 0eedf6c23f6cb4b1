"""What the steps of optimizers share: their arguments, gradients, rounding and undo buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ds_core.ops.arguments import (
    expect,
    expect_float,
    expect_shape,
    expect_together,
    randn,
    unaligned,
    wide,
)
from ds_core.seams.op import Floor

#: Which bits of an element's 32 random ones round which result: (multiplier, shift).
PARAMETER, FIRST_STATE, SECOND_STATE = (1, 0), (1, 16), (0x9E3779B1, 16)
#: Formats of a state that has a number for each of the parameter's.
STATE_DTYPES = (torch.float32, torch.bfloat16)
#: (numel, of a state, of the gradient, whether there is a copy) of the cases; None: as asked for.
CASES: tuple[tuple[int, torch.dtype | None, torch.dtype | None, bool], ...] = (
    (1, None, None, False),
    (0, None, None, True),
    (127, None, torch.bfloat16, True),
    (1003, torch.bfloat16, None, False),
    (4099, None, torch.float16, True),
)

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


# --- Arguments ------------------------------------------------------------------------------------


def check_step(
    op: str,
    param: torch.Tensor,
    grad: torch.Tensor,
    states: Mapping[str, torch.Tensor | None],
    *,
    copy: torch.Tensor | None = None,
    undo: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Raise OpError unless the tensors of a step fit.

    Contiguous, on one device; `grad`, every state and `copy` in the shape of `param`; states in
    one dtype, fp32 or bf16 (float64 for a float64 `param`); `undo` uint8, as long as `param` and
    the states together; `grad_scale` and `found_inf` 0-dim fp32.
    """
    expect_float(op, "param", param)
    expect_float(op, "grad", grad)
    expect_shape(op, "grad", grad, param.shape)
    present = {name: t for name, t in states.items() if t is not None}
    first = next(iter(present.values()), None)
    for name, state in present.items():
        allowed = STATE_DTYPES if param.dtype is not torch.float64 else (torch.float64,)
        expect(state.dtype in allowed, op, name, state.dtype, "torch.float32 or torch.bfloat16")
        if first is not None:
            expect(state.dtype is first.dtype, op, name, state.dtype, first.dtype)
        expect_shape(op, name, state, param.shape)
    if copy is not None:
        expect_float(op, "copy", copy)
        expect_shape(op, "copy", copy, param.shape)
    if undo is not None:
        check_undo(op, undo, [param, *present.values()])
    others = {"grad": grad, **present, "copy": copy, "undo": undo}
    expect_together(op, param, **others)
    check_scalars(op, param, grad_scale=grad_scale, found_inf=found_inf)
    for name, t in {"param": param, **others}.items():
        if t is not None:
            expect(t.is_contiguous(), op, name, "a tensor with gaps", "a contiguous one")


def check_scalars(op: str, param: torch.Tensor, **scalars: torch.Tensor | None) -> None:
    """Raise OpError unless each is a 0-dim fp32 tensor on the device of `param`, or None."""
    for name, t in scalars.items():
        if t is not None:
            fits = t.dim() == 0 and t.dtype in (torch.float32, torch.float64)
            got = f"{t.dtype} of shape {list(t.shape)}"
            expect(fits, op, name, got, "a 0-dim torch.float32")
    expect_together(op, param, **scalars)


def check_undo(op: str, undo: torch.Tensor, kept: Sequence[torch.Tensor]) -> None:
    """Raise OpError unless `undo` is a flat uint8 tensor with room for exactly `kept`."""
    expect(undo.dtype is torch.uint8, op, "undo", undo.dtype, torch.uint8)
    expect_shape(op, "undo", undo, (sum(t.nbytes for t in kept),))
    expect(undo.is_contiguous(), op, "undo", "a tensor with gaps", "a contiguous one")


def check_rates(op: str, **rates: float) -> None:
    """Raise OpError for a negative number, or a beta that is not in [0, 1)."""
    for name, value in rates.items():
        if name.startswith("beta"):
            expect(0 <= value < 1, op, name, value, "at least 0 and below 1")
        elif name == "step":
            expect(value >= 1, op, name, value, "1 or more, counting this step")
        else:
            expect(value >= 0, op, name, value, "0 or more")


# --- Arithmetic -----------------------------------------------------------------------------------


def effective_gradient(
    grad: torch.Tensor, grad_scale: torch.Tensor | None, maximize: bool = False
) -> torch.Tensor:
    """`grad * grad_scale`, or its negative, in fp32."""
    found = wide(grad)
    if grad_scale is not None:
        found = found * grad_scale
    return -found if maximize else found


@contextlib.contextmanager
def unless(
    found_inf: torch.Tensor | None, changed: Sequence[torch.Tensor | None]
) -> Iterator[None]:
    """Where `found_inf` is not 0, the tensors are after the block as they were; no host waits."""
    if found_inf is None:
        yield
        return
    present = [t for t in changed if t is not None]
    before = [t.clone() for t in present]
    yield
    for t, old in zip(present, before, strict=True):
        t.copy_(torch.where(found_inf == 0, t, old))


def random_bits(seed: int, numel: int, device: torch.device) -> torch.Tensor:
    """32 random bits for each of `numel` elements, as int64: a function of seed and position.

    The formula is that of `csrc/optim/rounding.h`, exactly.
    """
    position = torch.arange(numel, dtype=torch.int64, device=device)
    bits = torch.empty_like(position)
    for high in range((max(numel, 1) - 1 >> 32) + 1):
        part = slice(high << 32, min(numel, (high + 1) << 32))
        k0, k1 = rounding_keys(seed, high)
        x = (_times(position[part] & _MASK32, 0x9E3779B9) + k0) & _MASK32
        x = _times(x ^ (x >> 16), 0x7FEB352D)
        x = _times(x ^ (x >> 15) ^ k1, 0x846CA68B)
        bits[part] = x ^ (x >> 16)
    return bits


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """`x * factor` modulo 2^32, in halves so that no product leaves int64."""
    low = x * (factor & 0xFFFF)
    high = (x * (factor >> 16) & 0xFFFF) << 16
    return (low + high) & _MASK32


def rounding_keys(seed: int, high: int) -> tuple[int, int]:
    """The two 32-bit keys of `random_bits` at positions whose bits from the 33rd on are `high`."""
    s = (seed + high * 0x9E3779B97F4A7C15) & _MASK64
    s = ((s ^ (s >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    s = ((s ^ (s >> 27)) * 0x94D049BB133111EB) & _MASK64
    s ^= s >> 31
    return s & _MASK32, s >> 32


def store(
    target: torch.Tensor,
    value: torch.Tensor,
    bits: torch.Tensor | None = None,
    use: tuple[int, int] = PARAMETER,
) -> None:
    """Write fp32 `value` to `target`, rounded to nearest; with `bits`, bf16 stochastically.

    Stochastically: 16 random bits are added below the last one kept, and the sum is cut, so that
    the expectation is `value`. What is not finite is stored as it is.
    """
    if bits is None or target.dtype is not torch.bfloat16:
        target.copy_(value)
        return
    factor, shift = use
    noise = (_times(bits, factor) >> shift) & 0xFFFF
    raw = value.float().contiguous().view(torch.int32).to(torch.int64) & _MASK32
    cut = (raw + noise.view(value.shape)) & 0xFFFF0000
    signed = torch.where(cut >= 2**31, cut - 2**32, cut).to(torch.int32)
    rounded = signed.view(torch.float32)
    target.copy_(torch.where(torch.isfinite(value), rounded, value.float()))


def bits_of(seed: int | None, param: torch.Tensor) -> torch.Tensor | None:
    """The random bits of a step, or None if it rounds to nearest."""
    return None if seed is None else random_bits(seed, param.numel(), param.device)


def finish(
    param: torch.Tensor,
    value: torch.Tensor,
    copy: torch.Tensor | None,
    bits: torch.Tensor | None,
) -> None:
    """Store the new parameter; `copy` gets it as it was stored, rounded to nearest."""
    store(param, value, bits)
    if copy is not None:
        copy.copy_(param)


def save_undo(undo: torch.Tensor | None, kept: Sequence[torch.Tensor]) -> None:
    """Write the bytes of `kept` into `undo`, back to back."""
    if undo is not None and undo.numel():
        torch.cat([t.reshape(-1).view(torch.uint8) for t in kept], out=undo)


# --- Cases, floors --------------------------------------------------------------------------------


def tensors_of_cases(
    device: torch.device, dtype: torch.dtype, states: Sequence[bool]
) -> list[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor | None]]:
    """(param, grad, states, copy) of several sizes and formats, one of them unaligned.

    Args:
        states: for each state, whether it is positive.
    """
    found = []
    for index, (numel, state_dtype, grad_dtype, copied) in enumerate(CASES):
        param = randn(device, dtype, numel, seed=index)
        grad = randn(device, grad_dtype or dtype, numel, seed=index + 100)
        own = []
        for offset, positive in enumerate(states):
            state = randn(device, torch.float32, numel, seed=index + 200 + offset)
            state = state.square() if positive else state
            own.append(state.to(state_dtype or torch.float32))
        copy = torch.zeros(numel, dtype=torch.bfloat16, device=device) if copied else None
        found.append((param, grad, own, copy))
    param, grad, own, copy = found[2]
    away = None if copy is None else unaligned(copy)
    found.append((unaligned(param), unaligned(grad), [unaligned(s) for s in own], away))
    return found


def step_floor(
    param: torch.Tensor,
    grad: torch.Tensor,
    states: Sequence[torch.Tensor | None],
    copy: torch.Tensor | None,
    undo: torch.Tensor | None,
    flops: int,
) -> Floor:
    """Everything read once and written once, with `flops` per element."""
    kept = param.nbytes + sum(s.nbytes for s in states if s is not None)
    extra = sum(t.nbytes for t in (copy, undo) if t is not None)
    return Floor(kept + grad.nbytes, kept + extra, flops * param.numel())


def benchmark_tensors(
    device: torch.device, states: int
) -> list[tuple[str, torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor | None]]:
    """(label, param, grad, states, copy) of ten million elements in the formats of training."""
    numel, low = 10_000_000, torch.bfloat16
    found: list[Any] = []
    for label, dtype, grad_dtype, copied in (
        ("10M float32", torch.float32, torch.float32, False),
        ("10M bfloat16 gradient and copy", torch.float32, low, True),
        ("10M bfloat16", low, low, False),
    ):
        param = randn(device, dtype, numel)
        grad = randn(device, grad_dtype, numel, seed=1)
        own = [torch.full((numel,), 0.5, device=device) for _ in range(states)]
        copy = torch.empty(numel, dtype=low, device=device) if copied else None
        found.append((label, param, grad, own, copy))
    return found
