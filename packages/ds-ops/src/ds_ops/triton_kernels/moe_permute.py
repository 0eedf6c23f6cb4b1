"""Rows of tokens in the order of their experts, and back; forward and backward.

The order is a stable counting sort. Blocks of slots count theirs (a slot's rank in its block is the
number of slots of the same expert before it), counts are summed over the blocks before, and each
slot's row is the sum of three numbers: the same in every run, without atomics. The rows are then
moved by the token, so that a token is read once and each copy written once: nothing else is of the
size of the rows.

What a slot without a place would need is one more expert, behind the others, of rows of zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import moe_permute as op
from ds_core.ops.arguments import expect, expect_shape, expect_together
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch

#: Slots that are counted together.
_COUNTED = 128


@triton.jit
def _slot(position, tokens, k, BY_CHOICE: tl.constexpr):
    """Where a slot is, of the order in which slots are counted: as they are, or by choice first."""
    if BY_CHOICE:
        position = position % tokens * k + position // tokens
    return position


@triton.jit
def _home(indices, earlier, at, mask, experts, capacity, CAPPED: tl.constexpr):
    """The expert of slots; `experts` for those without a place."""
    expert = tl.load(indices + at, mask=mask, other=-1)
    there = (expert >= 0) & (expert < experts)
    if CAPPED:
        there = there & (tl.load(earlier + at, mask=mask, other=0) < capacity)
    return tl.where(there, expert, experts)


@triton.jit(do_not_specialize=["tokens", "k", "experts", "capacity"])
def count_slots(
    indices,
    earlier,
    homes,
    ranks,
    counts,
    tokens,
    k,
    experts,
    capacity,
    BY_CHOICE: tl.constexpr,
    CAPPED: tl.constexpr,
    SLOTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Of SLOTS slots: the expert, the rank among those of the block, and how many each has.

    earlier: `[tokens, k]`, if CAPPED: the rank among all slots of the expert, by choice.
    counts: `[blocks, experts + 1]`, zeros; the last column is of those without a place.
    """
    begin = tl.program_id(0) * SLOTS
    position = begin + tl.arange(0, SLOTS)
    mask = position < tokens * k
    at = _slot(position, tokens, k, BY_CHOICE)
    home = _home(indices, earlier, at, mask, experts, capacity, CAPPED)
    equal = tl.zeros((SLOTS,), tl.int32)
    for start in range(0, SLOTS, PART):
        other = begin + start + tl.arange(0, PART)
        there = other < tokens * k
        where = _slot(other, tokens, k, BY_CHOICE)
        compared = _home(indices, earlier, where, there, experts, capacity, CAPPED)
        compared = tl.where(there, compared, -1)
        # Those before count 1, those from the slot itself on 2 ** 16.
        one = tl.where(other[None, :] < position[:, None], 1, 65536)
        equal += tl.sum(tl.where(compared[None, :] == home[:, None], one, 0), axis=1)
    before = equal & 0xFFFF
    last = equal >> 16 == 1
    tl.store(homes + at, home, mask=mask)
    tl.store(ranks + at, before, mask=mask)
    own = counts + tl.program_id(0).to(tl.int64) * (experts + 1)
    tl.store(own + home, before + 1, mask=mask & last)


@triton.jit(do_not_specialize=["rows", "experts"])
def sum_counts(counts, totals, rows, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Of EXPERTS experts: counts become the sums of those of all blocks before.

    totals: `[experts + 1]`, of which the first is left as it is: the sum of expert e is behind it.
    """
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (expert <= experts)[None, :]
        at = row.to(tl.int64)[:, None] * (experts + 1) + expert[None, :]
        count = tl.load(counts + at, mask=mask, other=0)
        tl.store(counts + at, tl.cumsum(count, axis=0) - count + total[None, :], mask=mask)
        total += tl.sum(count, axis=0)
    tl.store(totals + 1 + expert, total, mask=expert < experts)


@triton.jit(do_not_specialize=["slots", "experts", "tokens", "k"])
def add_counts(homes, ranks, counts, slots, experts, tokens, k, SLOTS: tl.constexpr):
    """Ranks among all slots of an expert, by choice, from those in blocks of SLOTS."""
    begin = tl.program_id(0).to(tl.int64)
    position = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    mask = position < slots
    at = _slot(position, tokens, k, True)
    home = tl.load(homes + at, mask=mask, other=0)
    sums = tl.load(counts + begin * (experts + 1) + home, mask=mask, other=0)
    tl.store(ranks + at, tl.load(ranks + at, mask=mask, other=0) + sums, mask=mask)


@triton.jit(do_not_specialize=["tokens", "k", "experts"])
def copy_tokens(
    x,
    homes,
    ranks,
    counts,
    offsets,
    rows,
    row_map,
    tokens,
    k,
    experts,
    width,
    COUNTED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of TOKENS tokens, written to the row of each of their slots, or zeros.

    COUNTED: how many slots were counted together.
    """
    parts = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // parts * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    column = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    mask = inside[:, None] & (column < width)[None, :]
    value = tl.load(x + token[:, None] * width + column[None, :], mask=mask, other=0.0)
    for i in range(k):
        at = token * k + i
        home = tl.load(homes + at, mask=inside, other=0)
        row = tl.load(offsets + home) + tl.load(ranks + at, mask=inside, other=0)
        row += tl.load(counts + at // COUNTED * (experts + 1) + home, mask=inside, other=0)
        there = home < experts
        out = tl.where(there[:, None], value, 0.0).to(value.dtype)
        tl.store(rows + row.to(tl.int64)[:, None] * width + column[None, :], out, mask=mask)
        if tl.program_id(0) % parts == 0:
            tl.store(row_map + at, tl.where(there, row, -1), mask=inside)


@triton.jit
def _rows_of(row_map, first, start, tokens, k, rows, TOKENS: tl.constexpr, SLOTS: tl.constexpr):
    """Of SLOTS slots of TOKENS tokens, as one vector: token, place, is it one, row, has it one."""
    index = tl.arange(0, TOKENS * SLOTS)
    token = (first + index // SLOTS).to(tl.int64)
    slot = start + index % SLOTS
    place = token * k + slot
    inside = (slot < k) & (token < tokens)
    row = tl.load(row_map + place, mask=inside, other=-1)
    return token, place, inside, row.to(tl.int64), (row >= 0) & (row < rows)


@triton.jit(do_not_specialize=["tokens", "k", "rows"])
def sum_slots(
    y,
    row_map,
    weights,
    out,
    tokens,
    k,
    rows,
    width,
    WEIGHTED: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of TOKENS tokens: the sums over their slots, SLOTS at a time."""
    parts = tl.cdiv(width, BLOCK)
    first = tl.program_id(0) // parts * TOKENS
    column = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(0, k, SLOTS):
        _, place, _, row, there = _rows_of(row_map, first, start, tokens, k, rows, TOKENS, SLOTS)
        at = row[:, None] * width + column[None, :]
        value = tl.load(y + at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + place, mask=there, other=0.0)[:, None]
        total += tl.sum(tl.reshape(value, (TOKENS, SLOTS, BLOCK)), axis=1)
    token = (first + tl.arange(0, TOKENS)).to(tl.int64)
    at = token[:, None] * width + column[None, :]
    mask = (token < tokens)[:, None] & inside[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "k", "rows"])
def spread_gradient(
    grad,
    y,
    row_map,
    weights,
    dy,
    dweights,
    named,
    tokens,
    k,
    rows,
    width,
    WEIGHTED: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of the rows and weights of TOKENS tokens; the rows are noted in `named`."""
    first = tl.program_id(0) * TOKENS
    for begin in range(0, k, SLOTS):
        token, place, inside, row, there = _rows_of(
            row_map, first, begin, tokens, k, rows, TOKENS, SLOTS
        )
        inner = tl.zeros((TOKENS * SLOTS,), tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = there[:, None] & (column < width)[None, :]
            at = token[:, None] * width + column[None, :]
            g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
            at = row[:, None] * width + column[None, :]
            if WEIGHTED:
                inner += tl.sum(tl.load(y + at, mask=mask, other=0.0).to(tl.float32) * g, axis=1)
                g *= tl.load(weights + place, mask=there, other=0.0)[:, None]
            tl.store(dy + at, g.to(dy.dtype.element_ty), mask=mask)
        if WEIGHTED:
            tl.store(dweights + place, inner, mask=inside)
        tl.store(named + row, tl.full((TOKENS * SLOTS,), 1, tl.int8), mask=there)


@triton.jit(do_not_specialize=["rows"])
def clear_rows(named, dy, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in those of ROWS rows that no slot has named: mostly none."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    empty = (tl.load(named + row, mask=row < rows, other=1) == 0) & (row < rows)
    if tl.sum(empty.to(tl.int32), axis=0) > 0:
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            at = row.to(tl.int64)[:, None] * width + column[None, :]
            nothing = tl.zeros((ROWS, BLOCK), dy.dtype.element_ty)
            tl.store(dy + at, nothing, mask=empty[:, None] & (column < width)[None, :])


_COUNT = Kernel(
    count_slots,
    (Config({"SLOTS": _COUNTED, "PART": 32}),),
    types(
        {
            "*i32": "indices earlier homes ranks counts",
            "i32": "tokens k experts capacity",
        },
        BY_CHOICE=True,
        CAPPED=True,
    ),
)
_SUM = Kernel(
    sum_counts,
    (Config({"ROWS": 64, "EXPERTS": 16}),),
    types({"*i32": "counts totals", "i32": "rows experts"}),
)
_ADD = Kernel(
    add_counts,
    (Config({"SLOTS": _COUNTED}),),
    types({"*i32": "homes ranks counts", "i32": "slots experts tokens k"}),
)
_COPY = Kernel(
    copy_tokens,
    (
        Config({"TOKENS": 16, "BLOCK": 128}, {"width": 128}),
        Config({"TOKENS": 1, "BLOCK": 2048}),
    ),
    types(
        {
            "*bf16": "x rows",
            "*i32": "homes ranks counts offsets row_map",
            "i32": "tokens k experts",
            "i32:16": "width",
        },
        COUNTED=_COUNTED,
    ),
)
_NARROW = Config({"TOKENS": 4, "SLOTS": 4, "BLOCK": 128}, {"width": 128})
_SUM_SLOTS = Kernel(
    sum_slots,
    (_NARROW, Config({"TOKENS": 1, "SLOTS": 4, "BLOCK": 1024})),  # slots of a column in one thread
    types(
        {
            "*bf16": "y out",
            "*i32": "row_map",
            "*fp32": "weights",
            "i32": "tokens k rows",
            "i32:16": "width",
        },
        WEIGHTED=True,
    ),
)
_SPREAD = Kernel(
    spread_gradient,
    (_NARROW, Config({"TOKENS": 1, "SLOTS": 4, "BLOCK": 256}, warps=2)),  # a row for each warp
    types(
        {
            "*bf16": "grad y dy",
            "*i32": "row_map",
            "*i8": "named",
            "*fp32": "weights dweights",
            "i32": "tokens k rows",
            "i32:16": "width",
        },
        WEIGHTED=True,
    ),
)
_CLEAR = Kernel(
    clear_rows,
    (Config({"ROWS": 16, "BLOCK": 256}),),
    types({"*bf16": "dy", "*i8": "named", "i32": "rows", "i32:16": "width"}),
)
KERNELS = (_COUNT, _SUM, _ADD, _COPY, _SUM_SLOTS, _SPREAD, _CLEAR)


def moe_permute(
    x: torch.Tensor, indices: torch.Tensor, num_experts: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.moe_permute.permute_reference`.

    On a GPU, where a look at indices would wait for the device, one that is out of range is taken
    for -1.
    """
    rows, _, row_map = op.permute_fake(x, indices, num_experts, capacity)
    expect_plain(op.PERMUTE, x=x, indices=indices)
    if x.device.type == "cpu":
        op.check_indices(indices, num_experts)
    homes, ranks, counts, offsets = _placed(indices, num_experts, capacity)
    width, tokens = x.shape[1], len(x)
    config = _COPY.config(op.PERMUTE, x.device, width=width)
    launch(
        *(_COPY, config, (_tiles(config, tokens, max(width, 1)),)),
        *(x, homes, ranks, counts, offsets, rows, row_map),
        *(tokens, indices.shape[1], num_experts, width),
        COUNTED=_COUNTED,
    )
    return rows, offsets, row_map


def _tiles(config: Config, tokens: int, width: int) -> int:
    """How many programs have parts of rows of that width."""
    return blocks(tokens, config.constants["TOKENS"]) * blocks(width, config.constants["BLOCK"])


def _placed(
    indices: torch.Tensor, experts: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each slot its expert and its rank in its block, what precedes the block, and offsets."""
    if capacity is None:
        return _counted(indices, indices, experts, None, by_choice=False)
    homes, ranks, counts, _ = _counted(indices, indices, experts, None, by_choice=True)
    tokens, k = indices.shape
    config = _ADD.config(op.PERMUTE, indices.device)
    grid = (blocks(indices.numel(), _COUNTED),)
    launch(
        *(_ADD, config, grid, homes, ranks, counts),
        *(indices.numel(), experts, tokens, k),
    )
    return _counted(indices, ranks, experts, capacity, by_choice=False)


def _counted(
    indices: torch.Tensor,
    earlier: torch.Tensor,
    experts: int,
    capacity: int | None,
    *,
    by_choice: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, k = indices.shape
    many = blocks(tokens * k, _COUNTED)
    homes, ranks = torch.empty_like(indices), torch.empty_like(indices)
    counts = indices.new_zeros(many, experts + 1)
    totals = indices.new_zeros(experts + 1)
    launch(
        *(_COUNT, _COUNT.config(op.PERMUTE, indices.device), (many,)),
        *(indices, earlier, homes, ranks, counts, tokens, k, experts, capacity or 0),
        BY_CHOICE=by_choice,
        CAPPED=capacity is not None,
    )
    config = _SUM.config(op.PERMUTE, indices.device)
    grid = (blocks(experts + 1, config.constants["EXPERTS"]),)
    launch(_SUM, config, grid, counts, totals, many, experts)
    return homes, ranks, counts, totals.cumsum(0, dtype=torch.int32)


def moe_unpermute(
    y: torch.Tensor, row_map: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """As `ds_core.ops.moe_permute.unpermute_reference`.

    On a GPU, where a look at row_map would wait for the device, rows that are not there add
    nothing.
    """
    out = op.unpermute_fake(y, row_map, weights)
    expect_plain(op.UNPERMUTE, y=y, row_map=row_map, weights=weights)
    if y.device.type == "cpu":
        op.check_rows(row_map, len(y))
    (tokens, k), width = row_map.shape, y.shape[1]
    config = _SUM_SLOTS.config(op.UNPERMUTE, y.device, width=width)
    launch(
        *(_SUM_SLOTS, config, (_tiles(config, tokens, width),)),
        *(y, row_map, row_map if weights is None else weights, out, tokens, k, len(y), width),
        WEIGHTED=weights is not None,
    )
    return out


def moe_unpermute_backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    row_map: torch.Tensor,
    weights: torch.Tensor | None,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.moe_permute.unpermute_backward_reference`; unchecked on a GPU as forward."""
    _check_backward(grad, y, row_map, weights, rows)
    dy, dweights = op.unpermute_backward_fake(grad, y, row_map, weights, rows)
    (tokens, k), width = row_map.shape, grad.shape[1]
    named = torch.zeros(rows, dtype=torch.int8, device=grad.device)
    config = _SPREAD.config(op.UNPERMUTE, grad.device, width=width)
    launch(
        *(_SPREAD, config, (blocks(tokens, config.constants["TOKENS"]),)),
        *(grad, grad if y is None else y, row_map, dweights if weights is None else weights),
        *(dy, dweights, named, tokens, k, rows, width),
        WEIGHTED=weights is not None,
    )
    config = _CLEAR.config(op.UNPERMUTE, grad.device)
    grid = (blocks(rows, config.constants["ROWS"]),)
    launch(_CLEAR, config, grid, named, dy, rows, width)
    return dy, dweights


def _check_backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    row_map: torch.Tensor,
    weights: torch.Tensor | None,
    rows: int,
) -> None:
    expect(rows >= 0, op.UNPERMUTE, "rows", rows, "0 or more")
    expect(weights is None or y is not None, op.UNPERMUTE, "y", "None", "what was multiplied")
    like = grad if y is None else y
    op.unpermute_fake(like, row_map, weights)
    expect_shape(op.UNPERMUTE, "grad", grad, (len(row_map), like.shape[1]))
    expect(grad.dtype == like.dtype, op.UNPERMUTE, "grad", grad.dtype, like.dtype)
    if y is not None:
        expect_shape(op.UNPERMUTE, "y", y, (rows, grad.shape[1]))
    expect_plain(op.UNPERMUTE, grad=grad, y=y, row_map=row_map, weights=weights)
    expect_together(op.UNPERMUTE, grad, y=y, row_map=row_map, weights=weights)
    if grad.device.type == "cpu":
        op.check_rows(row_map, rows)
