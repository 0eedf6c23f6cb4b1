"""One step of Adam whose two states take eight bits each, with a scale per 256 elements.

Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2; the codes
are the high bits of a float, in place of their table.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ds_core.ops import optimizer_step as common
from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_shape,
    expect_together,
    randn,
    wide,
    wide_dtype,
)
from ds_core.ops.optimizer_step import random_bits
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Floor, Op

NAME = "adam8bit_step_"

#: Elements that share a scale.
BLOCK = 256

_SMALLEST = 2.0**-126
#: Codes without a sign, by whether the state has one: the highest, and what is added to a code to
#: get the high bits of a float in (0, 1].
_CODES = {True: (127, 889), False: (255, 761)}
_LOW_BITS = 20


def adam8bit_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg_codes: torch.Tensor,
    exp_avg_scales: torch.Tensor,
    exp_avg_sq_codes: torch.Tensor,
    exp_avg_sq_scales: torch.Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    copy: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    seed: int | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """`adam_step_` with states of one byte per element, decoded and encoded in the same pass.

    Args:
        param, grad, copy, grad_scale, found_inf: as `adam_step_` has them.
        exp_avg_codes, exp_avg_sq_codes: uint8, in the shape of `param`. State 0 is 0.
        exp_avg_scales, exp_avg_sq_scales: fp32, one per `BLOCK` elements, rounded up.
        seed: codes, and a bf16 param, are rounded stochastically; None: to nearest, with which
            `exp_avg_sq` cannot follow changes of less than half a step: train with a seed.

    See `decoded` for what the codes stand for.
    """
    run(
        NAME,
        param,
        grad,
        exp_avg_codes,
        exp_avg_scales,
        exp_avg_sq_codes,
        exp_avg_sq_scales,
        copy,
        grad_scale,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        decoupled,
        seed,
        found_inf,
    )


def decoded(codes: torch.Tensor, scales: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """The state that codes stand for, in their shape.

    With T(n) the fp32 number whose bits are `n << 20`: signed, as exp_avg is, `scale * T(c + 889)`
    with c the low seven bits, negative if the eighth is set, and 0 for c = 0; else
    `scale * T(code + 761)`.
    """
    flat = codes.reshape(-1).to(torch.int32)
    size = flat & 127 if signed else flat
    value = ((size + _lowest(signed)) << 20).view(torch.float32)
    if signed:
        value = torch.where(size == 0, 0.0, torch.where(flat >= 128, -value, value))
    value = value.to(scales.dtype) * _spread(scales, flat.numel())
    return value.view(codes.shape)


def encoded(
    values: torch.Tensor, *, signed: bool, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes in the shape of `values`, scales) of a state.

    The scale is the largest size of a block. No code of an unsigned state is 0 while the scale is
    not: a step would divide by it.

    noise: 20 random bits per element, as int64, for unbiased rounding; None: to nearest.
    """
    flat = values.reshape(-1).float()
    blocks = _blocks(flat)
    scales = blocks.abs().amax(1) if len(blocks) else flat.new_empty(0)
    scales = torch.where(scales > 0, scales.clamp(min=_SMALLEST), scales)
    ratio = flat.abs() / _spread(torch.where(scales > 0, scales, 1.0), flat.numel())
    added = 1 << 19 if noise is None else noise
    raw = ratio.view(torch.int32).to(torch.int64)
    codes = (((raw + added) >> 20) - _lowest(signed)).clamp(0, 127 if signed else 255)
    if signed:
        codes = codes + 128 * torch.signbit(flat)
    return codes.to(torch.uint8).view(values.shape), scales


def _lowest(signed: bool) -> int:
    """Bits 20 and up of the float that code 0 would stand for."""
    return 889 if signed else 761


def _spread(scales: torch.Tensor, numel: int) -> torch.Tensor:
    """The scale of each element."""
    return scales.repeat_interleave(BLOCK)[:numel]


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """Rows of `BLOCK`, the last filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def reference(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg_codes: torch.Tensor,
    exp_avg_scales: torch.Tensor,
    exp_avg_sq_codes: torch.Tensor,
    exp_avg_sq_scales: torch.Tensor,
    copy: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool,
    seed: int | None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """As `adam8bit_step_`."""
    fake(
        param,
        grad,
        exp_avg_codes,
        exp_avg_scales,
        exp_avg_sq_codes,
        exp_avg_sq_scales,
        copy,
        grad_scale,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        decoupled,
        seed,
        found_inf,
    )
    g, p = common.effective_gradient(grad, grad_scale), wide(param)
    if decoupled:
        p = p * (1 - lr * weight_decay)
    elif weight_decay:
        g = g + weight_decay * p
    mean = beta1 * decoded(exp_avg_codes, exp_avg_scales, signed=True) + (1 - beta1) * g
    square = decoded(exp_avg_sq_codes, exp_avg_sq_scales, signed=False)
    square = beta2 * square + (1 - beta2) * g * g
    denominator = square.sqrt() / math.sqrt(1 - beta2**step) + eps
    p = p - lr / (1 - beta1**step) * (mean / denominator)
    noise, bits = _noise_of(seed, param)
    codes = (exp_avg_codes, exp_avg_sq_codes)
    scales = (exp_avg_scales, exp_avg_sq_scales)
    with common.unless(found_inf, [param, *codes, *scales, copy]):
        for index, value in enumerate((mean, square)):
            found, scale = encoded(value.float(), signed=index == 0, noise=noise[index])
            codes[index].copy_(found)
            scales[index].copy_(scale)
        common.finish(param, p, copy, bits)


def _noise_of(
    seed: int | None, param: torch.Tensor
) -> tuple[tuple[torch.Tensor | None, torch.Tensor | None], torch.Tensor | None]:
    """Of each element: 20 bits for either moment, and 16 for a bf16 parameter.

    Two neighbours share 32 random bits, the second one with their ends exchanged.
    """
    if seed is None:
        return (None, None), None
    numel = param.numel()
    shared = random_bits(seed, -(-numel // 2), param.device)
    low, high = shared & 0xFFFFF, shared >> 12

    def spread(even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
        return torch.stack((even, odd), dim=1).view(-1)[:numel]

    return (spread(low, high), spread(high, low)), spread(shared & 0xFFFF, shared >> 16)


def _check_state(param: torch.Tensor, name: str, codes: torch.Tensor, scales: torch.Tensor) -> None:
    code_name, scale_name = f"{name}_codes", f"{name}_scales"
    expect(codes.dtype is torch.uint8, NAME, code_name, codes.dtype, torch.uint8)
    expect_shape(NAME, code_name, codes, param.shape)
    expected = wide_dtype(param.dtype)
    expect(scales.dtype is expected, NAME, scale_name, scales.dtype, expected)
    expect_shape(NAME, scale_name, scales, (-(-param.numel() // BLOCK),))
    expect_together(NAME, param, **{code_name: codes, scale_name: scales})
    for argument, t in ((code_name, codes), (scale_name, scales)):
        expect(t.is_contiguous(), NAME, argument, "a tensor with gaps", "a contiguous one")


def fake(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg_codes: torch.Tensor,
    exp_avg_scales: torch.Tensor,
    exp_avg_sq_codes: torch.Tensor,
    exp_avg_sq_scales: torch.Tensor,
    copy: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool,
    seed: int | None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """It returns nothing; raises OpError for what does not fit."""
    common.check_step(NAME, param, grad, {}, copy=copy, grad_scale=grad_scale, found_inf=found_inf)
    common.check_rates(NAME, beta1=beta1, beta2=beta2, eps=eps, step=step)
    _check_state(param, "exp_avg", exp_avg_codes, exp_avg_scales)
    _check_state(param, "exp_avg_sq", exp_avg_sq_codes, exp_avg_sq_scales)


#: lr, beta1, beta2, eps, weight_decay, step, decoupled, seed.
_SETTINGS = (
    (1e-3, 0.9, 0.999, 1e-8, 0.01, 5, True, None),
    (1e-2, 0.8, 0.95, 1e-6, 0.1, 7, False, None),
)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Odd, single and empty sizes; mixed formats; copies; a gradient scale; states of all codes."""
    scale = torch.tensor(0.25, device=device)
    found: list[tuple[Any, ...]] = []
    tensors = common.tensors_of_cases(device, dtype, (False, True))
    for index, (param, grad, (mean, square), copy) in enumerate(tensors):
        state = (*encoded(mean, signed=True), *encoded(square, signed=False))
        factor = scale if index % 2 else None
        found.append((param, grad, *state, copy, factor, *_SETTINGS[index % 2]))
    no, yes = torch.zeros((), device=device), torch.full((), 2.0, device=device)
    return [*found, (*found[2], yes), (*found[4], no)]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    a, b = torch.ones(8, device=device), torch.ones(8, device=device)
    codes, others = torch.zeros(2, 8, dtype=torch.uint8, device=device)
    scales, second = torch.zeros(1, device=device), torch.zeros(1, device=device)
    rest = (None, None, *_SETTINGS[0])
    return [
        ("grad: (got shape|has)", (a, b[:7], codes, scales, others, second, *rest)),
        ("exp_avg_codes: got torch.float32", (a, b, a.clone(), scales, others, second, *rest)),
        ("exp_avg_sq_codes: (got shape|has)", (a, b, codes, scales, others[:7], second, *rest)),
        ("found_inf: ", (a, b, codes, scales, others, second, *rest, a[:1])),
        (
            "exp_avg_scales: (got shape|has)",
            (a, b, codes, torch.zeros(2, device=device), others, second, *rest),
        ),
        (
            "exp_avg_sq_scales: got torch.float16",
            (a, b, codes, scales, others, second.half(), *rest),
        ),
    ]


def floor(*args: Any) -> Floor:
    param, grad, copy = args[0], args[1], args[6]
    states = sum(t.nbytes for t in args[2:6])
    written = param.nbytes + states + (copy.nbytes if copy is not None else 0)
    return Floor(param.nbytes + states + grad.nbytes, written, 40 * param.numel())


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    numel = 10_000_000
    state = (
        *encoded(randn(device, torch.float32, numel, seed=3), signed=True),
        *encoded(randn(device, torch.float32, numel, seed=4).square(), signed=False),
    )
    settings = (*_SETTINGS[0][:-1], 1)
    return [
        (label, (param, grad, *state, copy, None, *settings))
        for label, param, grad, _, copy in common.benchmark_tensors(device, 0)
    ]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg_codes, "
        "Tensor(c!) exp_avg_scales, Tensor(d!) exp_avg_sq_codes, Tensor(e!) exp_avg_sq_scales, "
        "Tensor(f!)? copy, Tensor? grad_scale, float lr, float beta1, float beta2, float eps, "
        "float weight_decay, int step, bool decoupled, int? seed, Tensor? found_inf=None) -> ()",
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
        # A code next to a tie may be its neighbour: compared by values, in tests of its own.
        measured=False,
    ),
)
