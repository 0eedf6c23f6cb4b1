"""Drawing tokens without sorting: what top-k and top-p leave is found digit by digit.

Logits as integers of the same order have 11 digits to the base 8. Each digit of the smallest one
that stays is found in one pass that counts, or weighs, what is above each of 8 candidates, so a
setting that is off costs nothing and one that is on 11 passes over a row that is in the L2 cache;
only the first one reads memory. Sums are kept per element of a block until the end of a pass: no
pass waits for a sum inside it, and the order of additions is always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import sample_tokens as op
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch

_LARGEST = tl.constexpr(op.LARGEST)
_NONE = tl.constexpr(2**31 - 1)


@triton.jit
def _without_nan(z):
    return tl.where(z != z, float("-inf"), z)


@triton.jit
def penalize(
    logits,
    repetition,
    presence,
    frequency,
    counts,
    prompt,
    out,
    vocabulary,
    REPEATED: tl.constexpr,
    PRESENT: tl.constexpr,
    FREQUENT: tl.constexpr,
    COUNTED: tl.constexpr,
    PROMPTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of a row of logits with its penalties, in fp32."""
    parts = tl.cdiv(vocabulary, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    mask = column < vocabulary
    at = row * vocabulary + column
    z = _without_nan(tl.load(logits + at, mask=mask, other=0.0).to(tl.float32))
    count = tl.zeros((BLOCK,), tl.int32)
    if COUNTED:
        count = tl.load(counts + at, mask=mask, other=0)
    if REPEATED:
        factor = tl.load(repetition + row) + tl.zeros((BLOCK,), tl.float32)
        seen = count > 0
        if PROMPTED:
            seen = seen | (tl.load(prompt + at, mask=mask, other=0) != 0)
        z = tl.where(seen, tl.where(z > 0, tl.div_rn(z, factor), z * factor), z)
    if COUNTED:
        if FREQUENT:
            z -= tl.load(frequency + row) * count.to(tl.float32)
        if PRESENT:
            z -= tl.load(presence + row) * tl.where(count > 0, 1.0, 0.0)
    tl.store(out + at, z, mask=mask)


@triton.jit
def _score(z, column, vocabulary, divisor):
    """Logits of a block, without NaN and -0, and divided by the temperature; -inf outside."""
    z = tl.where((column < vocabulary) & (z == z), z, float("-inf")) + 0.0
    return z, tl.minimum(z / divisor, _LARGEST)


@triton.jit
def _order(z):
    """Integers from 0 to 2^32 - 1 in the order of floats."""
    bits = z.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _number(order):
    """What `_order` makes such an integer from."""
    bits = (order ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mixed(s):
    """64 bits, each of which depends on each of s."""
    s = (s + 0x9E3779B97F4A7C15).to(tl.uint64)
    s = (s ^ (s >> 30)) * 0xBF58476D1CE4E5B9
    s = (s ^ (s >> 27)) * 0x94D049BB133111EB
    return s ^ (s >> 31)


@triton.jit
def _exponential(low, high, column):
    """Numbers of an exponential distribution, by 64 bits of a row and the column."""
    x = column.to(tl.uint32) * 0x9E3779B9 + low
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ high) * 0x846CA68B
    u = ((x ^ (x >> 16)).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # log1p(-u): of small u by its series.
    small = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * (0.25 + u * (0.2 + u * (1.0 / 6.0))))))
    return tl.where(u < 0.0625, small, -tl.log(1.0 - u))


@triton.jit
def _kth_largest(z_row, vocabulary, k, BLOCK: tl.constexpr):
    """The order of the k-th largest logit of a row."""
    found = tl.full((), 0, tl.uint32)
    digit = tl.arange(0, 8)
    for place in range(11):
        shift = 30 - 3 * place
        candidate = found + (digit.to(tl.uint32) << shift)
        total = tl.zeros((BLOCK, 8), tl.int32)
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(z_row + column, mask=column < vocabulary, other=0.0).to(tl.float32)
            z, _ = _score(z, column, vocabulary, 1.0)
            above = (_order(z)[:, None] >= candidate[None, :]) & (column < vocabulary)[:, None]
            total += above.to(tl.int32)
        enough = (tl.sum(total, axis=0) >= k) & ((place > 0) | (digit < 4))
        found += (tl.sum(enough.to(tl.int32), axis=0) - 1).to(tl.uint32) << shift
    return found


@triton.jit
def _weight(z, x, base, least, limit_order):
    """Order and unnormalized probability of a block; 0 where min_p or top_k leave nothing out."""
    order = _order(z)
    p = tl.exp(x - base)
    return order, tl.where((p >= least) & (order > limit_order), p, 0.0)


@triton.jit
def sample_row(
    logits,
    z,
    seeds,
    positions,
    temperature,
    top_k,
    top_p,
    min_p,
    tokens,
    log_probabilities,
    vocabulary,
    BLOCK: tl.constexpr,
):
    """The token of one row; z are its logits with penalties."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    z += row * vocabulary
    heat = tl.load(temperature + row)
    divisor = tl.where(heat > 0, heat, 1.0)
    # The largest with penalties, the first of several; log-sum-exp without.
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.full((BLOCK,), _NONE, tl.int32)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        one, _ = _score(tl.load(z + column, mask=inside).to(tl.float32), column, vocabulary, 1.0)
        place = tl.where(inside & ((one > largest) | (place == _NONE)), column, place)
        largest = tl.maximum(largest, one)
        raw, _ = _score(
            tl.load(logits + column, mask=inside).to(tl.float32), column, vocabulary, 1.0
        )
        larger = tl.maximum(top, raw)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(top - shift) + tl.exp(raw - shift)
        top = larger
    best = tl.max(largest, axis=0)
    first = tl.min(tl.where(largest == best, place, _NONE), axis=0)
    highest = tl.max(top, axis=0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    log_sum = tl.log(tl.sum(total * tl.exp(top - base), axis=0)) + base
    token = first
    if heat > 0:
        token = _draw(
            z, first, best, vocabulary, divisor,
            tl.load(seeds + row), tl.load(positions + row),
            tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row), BLOCK,
        )  # fmt: skip
    tl.store(tokens + row, token.to(tl.int64))
    chosen = _without_nan(tl.load(logits + token).to(tl.float32))
    tl.store(log_probabilities + row, chosen - log_sum)


@triton.jit
def _draw(
    z_row, first, best, vocabulary, divisor, seed, position, k, limit, least, BLOCK: tl.constexpr
):
    """A token of those that stay. Those are above `bound`, or the first `equals` that are at it."""
    best_score = tl.minimum(best / divisor, _LARGEST)
    base = tl.where(best_score == float("-inf"), 0.0, best_score)
    bound = tl.full((), 0, tl.uint32)
    equals = tl.full((), _NONE, tl.int32)
    # Orders begin at that of -inf: above 0, so that nothing is at the bound.
    if (k > 0) & (k < vocabulary):
        bound = _kth_largest(z_row, vocabulary, k, BLOCK)
        above = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(z_row + column, mask=column < vocabulary, other=0.0).to(tl.float32)
            z, _ = _score(z, column, vocabulary, divisor)
            above += ((column < vocabulary) & (_order(z) > bound)).to(tl.int32)
        equals = k - tl.sum(above, axis=0)
    if limit < 1:
        bound, equals = _top_p(z_row, vocabulary, divisor, base, least, limit, bound, equals, BLOCK)
    bits = _mixed(_mixed(seed.to(tl.uint64)) + position.to(tl.uint64))
    low = (bits & 0xFFFFFFFF).to(tl.uint32)
    high = (bits >> 32).to(tl.uint32)
    winner = tl.full((), float("-inf"), tl.float32)
    token = first
    met = tl.full((), 0, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        z = tl.load(z_row + column, mask=inside, other=0.0).to(tl.float32)
        z, x = _score(z, column, vocabulary, divisor)
        order = _order(z)
        equal = (inside & (order == bound)).to(tl.int32)
        rank = met + tl.cumsum(equal, axis=0)
        met += tl.sum(equal, axis=0)
        stays = (order > bound) | ((order == bound) & (rank <= equals))
        stays = (inside & stays & (tl.exp(x - base) >= least)) | (column == first)
        score = tl.where(stays, x - tl.log(_exponential(low, high, column)), float("-inf"))
        most = tl.max(score, axis=0)
        where = tl.min(tl.where(stays & (score == most), column, _NONE), axis=0)
        token = tl.where(most > winner, where, token)
        winner = tl.maximum(winner, most)
    return token


@triton.jit
def _top_p(z_row, vocabulary, divisor, base, least, limit, bound, equals, BLOCK: tl.constexpr):
    """The bound, and how many that are at it stay, after top_p."""
    at_bound = _number(bound)
    at_bound = tl.where(at_bound == at_bound, at_bound, float("-inf"))
    share = tl.exp(tl.minimum(at_bound / divisor, _LARGEST) - base)
    # Of those at the bound of top_k, with bound 0 there are none.
    held = tl.where((share >= least) & (bound > 0), share * equals.to(tl.float32), 0.0)
    digit = tl.arange(0, 8)
    found = tl.full((), 0, tl.uint32)
    target = tl.full((), 0.0, tl.float32)
    for place in range(11):
        shift = 30 - 3 * place
        candidate = found + (digit.to(tl.uint32) << shift)
        total = tl.zeros((BLOCK, 8), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(z_row + column, mask=column < vocabulary, other=0.0).to(tl.float32)
            z, x = _score(z, column, vocabulary, divisor)
            order, p = _weight(z, x, base, least, bound)
            total += tl.where(order[:, None] >= candidate[None, :], p[:, None], 0.0)
        mass = tl.sum(total, axis=0) + tl.where(candidate <= bound, held, 0.0)
        if place == 0:
            target = limit * tl.max(mass, axis=0)
        enough = (mass >= target) & ((place > 0) | (digit < 4))
        count = tl.maximum(tl.sum(enough.to(tl.int32), axis=0), 1)
        found += (count - 1).to(tl.uint32) << shift
    above = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + column, mask=column < vocabulary, other=0.0).to(tl.float32)
        z, x = _score(z, column, vocabulary, divisor)
        order, p = _weight(z, x, base, least, bound)
        above += tl.where(order > found, p, 0.0)
    one = tl.exp(tl.minimum(_number(found) / divisor, _LARGEST) - base)
    wanted = tl.ceil((target - tl.sum(above, axis=0)) / one)
    wanted = tl.where((wanted >= 1) & (wanted < 1e9), wanted, 1.0).to(tl.int32)
    return found, tl.where(found == bound, tl.minimum(wanted, equals), wanted)


_ALL = dict.fromkeys(("REPEATED", "PRESENT", "FREQUENT", "COUNTED", "PROMPTED"), True)
_ROWS = {
    "*bf16": "logits",
    "*fp32": "repetition presence frequency out",
    "*i32": "counts",
    "*u8": "prompt",
    "i32:16": "vocabulary",
}
_PENALIZE = Kernel(penalize, (Config({"BLOCK": 1024}, warps=4),), types(_ROWS, **_ALL))
_SAMPLE = Kernel(
    sample_row,
    (Config({"BLOCK": 512}, {"vocabulary": 4096}, warps=4), Config({"BLOCK": 2048}, warps=16)),
    types(
        {
            "*bf16": "logits",
            "*fp32": "z temperature top_p min_p log_probabilities",
            "*i64": "seeds positions tokens",
            "*i32": "top_k",
            "i32:16": "vocabulary",
        }
    ),
)
KERNELS = (_PENALIZE, _SAMPLE)


def sample_tokens(
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
    """As `ds_core.ops.sample_tokens.reference`."""
    settings = (seeds, positions, temperature, top_k, top_p, min_p)
    penalties = (repetition, presence, frequency, output_counts, prompt_mask)
    tokens, log_probabilities = op.fake(logits, *settings, *penalties)
    names = ("seeds", "positions", "temperature", "top_k", "top_p", "min_p")
    expect_plain(
        op.NAME, logits=logits, repetition_penalty=repetition, presence_penalty=presence,
        frequency_penalty=frequency, output_counts=output_counts, prompt_mask=prompt_mask,
        **dict(zip(names, settings, strict=True)),
    )  # fmt: skip
    rows, vocabulary = logits.shape
    z = _penalized(logits, repetition, presence, frequency, output_counts, prompt_mask)
    config = _SAMPLE.config(op.NAME, logits.device, vocabulary=vocabulary)
    launch(*(_SAMPLE, config, (rows,), logits, z, *settings, tokens, log_probabilities, vocabulary))
    return tokens, log_probabilities


def _penalized(
    logits: torch.Tensor,
    repetition: torch.Tensor | None,
    presence: torch.Tensor | None,
    frequency: torch.Tensor | None,
    counts: torch.Tensor | None,
    prompt: torch.Tensor | None,
) -> torch.Tensor:
    """Logits with penalties in fp32, or as they are if there are none."""
    repeated = repetition is not None and (counts is not None or prompt is not None)
    counted = counts is not None and (presence is not None or frequency is not None)
    if not (repeated or counted):
        return logits
    rows, vocabulary = logits.shape
    config = _PENALIZE.config(op.NAME, logits.device)
    out = torch.empty_like(logits, dtype=torch.float32)
    numbers = (out if t is None else t for t in (repetition, presence, frequency, counts))
    launch(
        *(_PENALIZE, config, (rows * blocks(vocabulary, config.constants["BLOCK"]),)),
        *(logits, *numbers, out if prompt is None else prompt.view(torch.uint8), out, vocabulary),
        REPEATED=repetition is not None,
        PRESENT=presence is not None,
        FREQUENT=frequency is not None,
        COUNTED=counts is not None,
        PROMPTED=prompt is not None,
    )
    return out
