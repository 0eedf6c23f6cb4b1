"""Drawing the next token of each row of logits, by settings of its own.

Source: Keskar et al. 2019, section 4.1 (repetition); Fan et al. 2018 (top-k); Holtzman et al. 2020
(top-p); Nguyen et al. 2024 (min-p); Gumbel 1954 (the draw).
"""

from __future__ import annotations

from typing import Any

import torch

from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_shape,
    expect_tensors,
    expect_together,
    randn,
    wide,
    wide_dtype,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Floor, Op

NAME = "sample_tokens"
_MASK32 = 0xFFFFFFFF
#: Scores are cut here, so that no temperature makes infinities of them.
LARGEST = 3.0e38


#: Settings of rows that are no fp32.
_INTEGERS = {"seeds": torch.int64, "positions": torch.int64, "top_k": torch.int32}


def sample_tokens(
    logits: torch.Tensor,
    *,
    seeds: torch.Tensor | int,
    positions: torch.Tensor | int,
    temperature: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    min_p: torch.Tensor | float = 0.0,
    repetition_penalty: torch.Tensor | float | None = None,
    presence_penalty: torch.Tensor | float | None = None,
    frequency_penalty: torch.Tensor | float | None = None,
    output_counts: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each row, drawn by the row's own settings, and its log-probability.

    Of what is `[rows]`, a number stands for the same in every row. In this order:

    1. Penalties. A token that is in the prompt or was put out: a logit above 0 is divided by
       `repetition_penalty`, another is multiplied by it. Then `frequency_penalty` times how often
       it was put out is subtracted, and `presence_penalty` if it was at all.
    2. `temperature`: logits are divided by it. At 0 or less the largest one is taken, of several
       the first, and nothing below matters.
    3. `top_k`: that many of the largest stay, of equal ones the first; 0 or less: all. `min_p`:
       of these, those stay whose probability is at least that of the largest times `min_p`.
    4. `top_p`: of these, in falling order, equal ones in the order of their ids, the fewest stay
       whose probabilities, made to add up to 1, reach `top_p`; 1 or more: all. One always stays.
    5. One of these is drawn by its probability: `argmax(logit - log(e))`, with e from an
       exponential distribution, a function of seed, position and token. So a row's token does not
       depend on the rows around it, and is the same when it is drawn again.

    Args:
        logits: `[rows, vocabulary]`, fp32, bf16 or fp16; computed in fp32. A NaN counts as -inf.
        seeds: `[rows]`, int64: of the request.
        positions: `[rows]`, int64: of the token that is drawn; each one is another draw.
        temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty:
            `[rows]`, fp32.
        top_k: `[rows]`, int32.
        output_counts: `[rows, vocabulary]`, int32: how often each token was put out; None: never.
        prompt_mask: `[rows, vocabulary]`, bool: which tokens are in the prompt; None: none.

    Returns tokens `[rows]`, int64, and `log softmax(logits)[token]`, `[rows]`, fp32: of the logits
    as they were given. No gradient.

    Raises OpError for shapes or dtypes that do not fit.
    """
    expect_tensors(NAME, logits=logits)
    given = {
        "seeds": seeds,
        "positions": positions,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    by_row = [_spread(name, value, logits) for name, value in given.items()]
    result: tuple[torch.Tensor, torch.Tensor] = run(
        NAME, logits, *by_row, output_counts, prompt_mask
    )
    return result


def _spread(name: str, value: Any, logits: torch.Tensor) -> torch.Tensor | None:
    """A setting for each row; of a number, which is looked at, it is the same for all."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    dtype = _INTEGERS.get(name, torch.float32)
    if name in _INTEGERS:
        expect(isinstance(value, int | torch.SymInt), NAME, name, value, f"an integer or {dtype}")
    else:
        expect(isinstance(value, int | float), NAME, name, value, f"a number or {dtype}")
        expect(value == value, NAME, name, value, "a number")
    if name == "repetition_penalty":
        expect(value > 0, NAME, name, value, "more than 0")
    return torch.full(logits.shape[:1], value, dtype=dtype, device=logits.device)


def reference(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    repetition: torch.Tensor | None = None,
    presence: torch.Tensor | None = None,
    frequency: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sample_tokens`, by sorting every row."""
    settings = (seeds, positions, temperature, top_k, top_p, min_p)
    penalties = (repetition, presence, frequency, output_counts, prompt_mask)
    check(logits, *settings, *penalties)
    z = penalized(logits, *penalties)
    first = first_largest(z)
    x = scaled(z, temperature)
    kept = support(z, x, top_k, top_p, min_p)
    kept.scatter_(1, first.unsqueeze(1), True)
    ids = torch.arange(z.shape[1], device=z.device)
    score = x - exponential(seeds, positions, ids).log().to(x.dtype)
    drawn = first_largest(score, kept)
    tokens = torch.where(temperature > 0, drawn, first)
    return tokens, log_probability(logits, tokens)


def penalized(
    logits: torch.Tensor,
    repetition: torch.Tensor | None,
    presence: torch.Tensor | None,
    frequency: torch.Tensor | None,
    output_counts: torch.Tensor | None,
    prompt_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Logits with penalties, at least fp32; no NaN."""
    z = wide(logits)
    z = torch.where(z.isnan(), -torch.inf, z)
    out = None if output_counts is None else output_counts > 0
    if repetition is not None:
        factor = repetition.unsqueeze(1)
        turned = torch.where(z > 0, z / factor, z * factor)
        for seen in (prompt_mask, out):
            z = z if seen is None else torch.where(seen, turned, z)
    if output_counts is not None and out is not None:
        if frequency is not None:
            z = z - frequency.unsqueeze(1) * output_counts
        if presence is not None:
            z = z - presence.unsqueeze(1) * out
    return z + 0.0  # -0 is equal to 0


def scaled(z: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Logits divided by the temperature, where it is above 0."""
    divisor = torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    return (z / divisor).clamp(max=LARGEST)


def support(
    z: torch.Tensor,
    x: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Which tokens may be drawn, `[rows, vocabulary]`: those that top_k, min_p and top_p leave."""
    vocabulary = z.shape[1]
    order = z.sort(dim=1, descending=True, stable=True).indices
    xs = x.gather(1, order)
    largest = xs[:, :1]
    ps = (xs - torch.where(largest.isfinite(), largest, 0.0)).exp()
    most = torch.where(top_k > 0, top_k, vocabulary).unsqueeze(1)
    alive = torch.arange(vocabulary, device=z.device) < most
    alive = alive & (ps >= min_p.unsqueeze(1))
    ps = ps * alive
    mass = ps.cumsum(1)
    limit = top_p.unsqueeze(1)
    alive = alive & ((mass - ps < limit * mass[:, -1:]) | (limit >= 1))
    return torch.zeros_like(alive).scatter_(1, order, alive)


def exponential(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Numbers of an exponential distribution, `[rows, tokens]`, fp32, never 0."""
    keys = _mixed(_mixed(seeds) + positions)
    x = tokens * 0x9E3779B9 & _MASK32
    x = (x + (keys & _MASK32).unsqueeze(1)) & _MASK32
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK32
    x = (x ^ (x >> 15) ^ (keys >> 32 & _MASK32).unsqueeze(1)) * 0x846CA68B & _MASK32
    uniform = ((x ^ (x >> 16)).float() + 0.5) * 2.0**-32
    return -torch.log1p(-uniform)


def _mixed(s: torch.Tensor) -> torch.Tensor:
    """64 bits, each of which depends on each of s (Steele et al. 2014)."""
    s = s + _signed(0x9E3779B97F4A7C15)
    s = (s ^ (s >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    s = (s ^ (s >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return s ^ (s >> 31 & (1 << 33) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 64)


def first_largest(x: torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
    """The first of the largest elements of each row, `[rows]`; `among`: of those only."""
    ids = torch.arange(x.shape[1], device=x.device)
    if among is None:
        return torch.where(x == x.amax(1, keepdim=True), ids, x.shape[1]).amin(1)
    best = torch.where(among, x, -torch.inf).amax(1, keepdim=True)
    return torch.where(among & (x == best), ids, x.shape[1]).amin(1)


def log_probability(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`log softmax(logits)` of tokens, `[rows]`; a NaN among the logits counts as -inf."""
    z = wide(logits)
    z = torch.where(z.isnan(), -torch.inf, z)
    return z.gather(1, tokens.unsqueeze(1)).squeeze(1) - z.logsumexp(1)


def check(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    repetition: torch.Tensor | None,
    presence: torch.Tensor | None,
    frequency: torch.Tensor | None,
    output_counts: torch.Tensor | None,
    prompt_mask: torch.Tensor | None,
) -> None:
    """Raise OpError unless shapes and dtypes fit."""
    expect_float(NAME, "logits", logits)
    fits = logits.dim() == 2 and 0 < logits.shape[1] < 2**31
    expect(fits, NAME, "logits", f"shape {list(logits.shape)}", "[rows, vocabulary of 1 or more]")
    floats = (torch.float32, torch.float64)
    named = {
        "seeds": (seeds, (torch.int64,)),
        "positions": (positions, (torch.int64,)),
        "temperature": (temperature, floats),
        "top_k": (top_k, (torch.int32,)),
        "top_p": (top_p, floats),
        "min_p": (min_p, floats),
        "repetition_penalty": (repetition, floats),
        "presence_penalty": (presence, floats),
        "frequency_penalty": (frequency, floats),
        "output_counts": (output_counts, (torch.int32,)),
        "prompt_mask": (prompt_mask, (torch.bool,)),
    }
    for name, (t, dtypes) in named.items():
        if t is None:
            continue
        expect(t.dtype in dtypes, NAME, name, t.dtype, dtypes[0])
        whole = name in ("output_counts", "prompt_mask")
        expect_shape(NAME, name, t, logits.shape if whole else logits.shape[:1])
        expect_together(NAME, logits, **{name: t})


def fake(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    repetition: torch.Tensor | None = None,
    presence: torch.Tensor | None = None,
    frequency: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    settings = (seeds, positions, temperature, top_k, top_p, min_p)
    penalties = (repetition, presence, frequency, output_counts, prompt_mask)
    check(logits, *settings, *penalties)
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    return tokens, torch.empty_like(tokens, dtype=wide_dtype(logits.dtype))


def settings(
    device: torch.device,
    rows: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    """Seeds, positions and the same settings for every row, as the op takes them."""

    def of(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    number = torch.arange(rows, device=device)
    return (
        *(number * 7919 + 1, number * 3 % 5, of(temperature, torch.float32)),
        *(of(top_k, torch.int32), of(top_p, torch.float32), of(min_p, torch.float32)),
    )


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Every setting alone and mixed by row; equal logits; penalties; one token, one row, none."""

    def made(rows: int, vocabulary: int, *args: Any) -> tuple[Any, ...]:
        return (
            randn(device, dtype, rows, vocabulary) * 2,
            *settings(device, rows, *args),
        )

    def of(values: list[float], kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=kind, device=device)

    rows, vocabulary = 6, 211
    logits, seeds, positions, *_ = made(rows, vocabulary)
    mixed = (
        *(of([0.0, 0.5, 1.0, 2.0, 1.0, 30.0]), of([0, 7, 1, 400, 0, 3], torch.int32)),
        *(of([1.0, 0.8, 1.0, 0.95, 0.3, 0.0]), of([0.0, 0.0, 0.1, 0.05, 0.02, 0.0])),
    )
    equal = (logits * 2).round()  # several are as large as the last that stays
    generator = torch.Generator().manual_seed(5)
    counts = torch.randint(-4, 5, (rows, vocabulary), generator=generator).clamp(min=0)
    counts = counts.to(device, torch.int32)
    prompt = (torch.rand(rows, vocabulary, generator=generator) < 0.3).to(device)
    by_row = of([1.3, 1.0, 0.7, 1.1, 2.0, 1.2]), of([0.5, 0.0, -0.3, 1.0, 0.0, 0.2])
    strange = logits.clone()
    strange[0], strange[1, 3], strange[2, :200] = -torch.inf, torch.nan, -torch.inf
    infinite = torch.where(logits == logits.amax(1, keepdim=True), torch.inf, logits)
    prompt |= infinite.isinf()
    return [
        (logits, seeds, positions, *mixed),
        (equal, seeds, positions, *mixed),
        (equal, seeds, positions, *settings(device, rows, 0.7, 20, 0.7)[2:]),
        (equal * 0, seeds, positions, *settings(device, rows, 1.0, 20, 0.51)[2:]),
        made(2, 2500, 0.9, 50, 0.9),
        made(3, 1000, 1.5, 0, 0.9, 0.01),
        made(3, 64),
        made(1, 1, 1.0, 1, 0.5, 0.5),
        made(0, 10),
        (logits, seeds, positions, *mixed, *by_row, by_row[1] / 3, counts, prompt),
        (equal, seeds, positions, *mixed, by_row[0], None, None, None, prompt),
        (logits, seeds, positions, *mixed, None, *by_row, counts, None),
        (strange, seeds, positions, *settings(device, rows, 1.0, 9, 0.9)[2:]),
        (infinite, seeds, positions, *mixed, by_row[0], None, None, None, prompt),
    ]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    logits = torch.zeros(2, 5, device=device)
    names = ("seeds", "positions", "temperature", "top_k", "top_p", "min_p")
    plain = dict(zip(names, settings(device, 2), strict=True))

    def call(z: torch.Tensor = logits, *rest: Any, **changed: torch.Tensor) -> tuple[Any, ...]:
        return (z, *(plain | changed).values(), *rest)

    one, counts = torch.ones(2, device=device), torch.zeros(2, 5, device=device)
    return [
        ("logits: got torch.int64", call(logits.long())),
        ("logits: got shape", call(logits[0])),
        ("logits: got shape .*vocabulary of 1 or more", call(logits[:, :0])),
        ("seeds: got torch.int32", call(seeds=plain["seeds"].int())),
        ("positions: got shape", call(positions=plain["positions"][:1])),
        ("temperature: got torch.float16", call(temperature=one.half())),
        ("top_k: got torch.int64", call(top_k=plain["top_k"].long())),
        ("top_p: got shape", call(top_p=one[:1])),
        ("min_p: got torch.int64", call(min_p=one.long())),
        ("repetition_penalty: got shape", call(logits, one[:1])),
        ("presence_penalty: got torch.bool", call(logits, None, one.bool())),
        ("frequency_penalty: got shape", call(logits, None, None, one[:1])),
        ("output_counts: got torch.float32", call(logits, one, one, one, counts)),
        ("output_counts: got shape", call(logits, one, one, one, counts.int()[:, :3])),
        ("prompt_mask: got torch.float32", call(logits, one, one, one, None, counts)),
    ]


def floor(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    repetition: torch.Tensor | None = None,
    presence: torch.Tensor | None = None,
    frequency: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
) -> Floor:
    read = sum(t.nbytes for t in (logits, output_counts, prompt_mask) if t is not None)
    return Floor(read + 32 * len(logits), 12 * len(logits), 20 * logits.numel())


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    """A decode step of 64 and of 8 requests over a vocabulary of 128256."""
    return [
        (
            f"{rows}x128256 {label}",
            (
                randn(device, torch.bfloat16, rows, 128256),
                *settings(device, rows, heat, top_k, top_p),
            ),
        )
        for rows in (64, 8)
        for label, heat, top_k, top_p in (
            ("greedy", 0.0, 0, 1.0),
            ("temperature", 0.8, 0, 1.0),
            ("top-k 50, top-p 0.9", 0.8, 50, 0.9),
        )
    ]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor logits, Tensor seeds, Tensor positions, Tensor temperature, Tensor top_k, "
        "Tensor top_p, Tensor min_p, Tensor? repetition_penalty=None, "
        "Tensor? presence_penalty=None, Tensor? frequency_penalty=None, "
        "Tensor? output_counts=None, Tensor? prompt_mask=None) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
    ),
)
