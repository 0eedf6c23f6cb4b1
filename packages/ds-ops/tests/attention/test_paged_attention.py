"""paged_attention: every implementation against the reference, and what a user relies on."""

from __future__ import annotations

import pytest
import torch

import ds_ops
from ds_core.errors import OpError
from ds_core.ops.paged_attention import example, fp8_example
from ds_core.testing.contracts import OpContract

CPU = torch.device("cpu")


class TestPagedAttention(OpContract):
    op = "paged_attention"


def dense(args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """By torch's own attention in float64, for sequences whose queries are all their tokens."""
    q, k_cache, v_cache, table, lengths, _ = args
    found, begin = [], 0
    for blocks, length in zip(table, lengths.tolist(), strict=True):
        used = blocks[: -(-length // k_cache.shape[1])].long()
        k, v = (
            cache[used].flatten(0, 1)[:length].double().transpose(0, 1)
            for cache in (k_cache, v_cache)
        )
        own = q[begin : begin + length].double().transpose(0, 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            own[None], k[None], v[None], is_causal=True, enable_gqa=True
        )
        found.append(out[0].transpose(0, 1))
        begin += length
    return torch.cat(found)


def test_prefill_equals_torchs_attention() -> None:
    args = example(CPU, torch.float32, [(65, 65), (1, 1), (130, 130)], (8, 2), 64)
    truth = dense(args)
    error = (ds_ops.paged_attention(*args) - truth).norm() / truth.norm()
    assert error < 1e-6


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1025])
def test_decode_equals_the_last_row_of_a_prefill(length: int) -> None:
    q, *rest, _ = example(CPU, torch.float32, [(length, length)], (4, 2), 32)
    whole = ds_ops.paged_attention(q, *rest, torch.tensor([0, length], dtype=torch.int32))
    last = ds_ops.paged_attention(
        q[-1:].contiguous(), *rest, torch.tensor([0, 1], dtype=torch.int32)
    )
    torch.testing.assert_close(last, whole[-1:], rtol=1e-5, atol=1e-6)


def test_a_sequence_does_not_depend_on_its_company() -> None:
    sequences = [(1, 1200), (40, 90), (3, 70), (300, 300)]
    q, k, v, table, lengths, starts = example(CPU, torch.bfloat16, sequences, (6, 2), 64)
    together = ds_ops.paged_attention(q, k, v, table, lengths, starts)
    for index in range(len(sequences)):
        begin, end = starts[index], starts[index + 1]
        alone = ds_ops.paged_attention(
            q[begin:end].contiguous(),
            *(k, v, table[index : index + 1], lengths[index : index + 1]),
            torch.tensor([0, int(end - begin)], dtype=torch.int32),
        )
        assert torch.equal(alone, together[begin:end]), f"sequence {index}"


def test_threads_share_one_long_sequence_and_change_nothing() -> None:
    args = example(CPU, torch.bfloat16, [(1, 5000)], (8, 4), 64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ds_ops.paged_attention(*args))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_window_of_one_returns_the_token_itself() -> None:
    q, k, v, table, lengths, starts = example(CPU, torch.float32, [(5, 40), (1, 7)], (2, 2), 16)
    out = ds_ops.paged_attention(q, k, v, table, lengths, starts, window=1)
    newest = v[table[0, 39 // 16].long(), 39 % 16]
    torch.testing.assert_close(out[4], newest)


def test_values_of_later_tokens_do_not_reach_earlier_ones() -> None:
    q, k, v, table, lengths, starts = example(CPU, torch.float32, [(20, 20)], (2, 1), 32)
    before = ds_ops.paged_attention(q, k, v, table, lengths, starts)
    v[table[0, 1].long(), 3] = 1e30  # token 19
    after = ds_ops.paged_attention(q, k, v, table, lengths, starts)
    assert torch.equal(before[:19], after[:19])


@pytest.mark.parametrize("queries", [1, 30])
def test_a_nan_is_not_hidden(queries: int) -> None:
    args = example(CPU, torch.float32, [(queries, 600)], (2, 1), 32)
    args[0][0, 1, 3] = torch.nan
    out = ds_ops.paged_attention(*args)
    assert out[0, 1].isnan().all()
    assert out[0, 0].isfinite().all()


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    args = example(CPU, torch.float32, [(1, 700), (40, 40)], (2, 1), 32)
    out = ds_ops.paged_attention(*args, scale=1e4)
    assert out.isfinite().all()
    uniform = ds_ops.paged_attention(*args, scale=0.0)
    assert uniform[0].abs().max() < 1  # the mean of 700 values


def test_it_is_part_of_a_compiled_step() -> None:
    q, k_cache, v_cache, table, lengths, starts = example(CPU, torch.float32, [(1, 20)], (4, 2), 32)
    k, v = torch.randn(2, 1, 2, 32)
    slots = (table[0, 1].long() * 16 + 3)[None]

    def step(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        ds_ops.write_kv_cache(k, v, k_cache, v_cache, slots)
        return ds_ops.paged_attention(q, k_cache, v_cache, table, lengths, starts) * 2

    copies = k_cache.clone(), v_cache.clone()
    expected = step(q, *copies)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k_cache, v_cache)
    torch.testing.assert_close(got, expected)
    used = table[0, 1].long()
    assert torch.equal(k_cache[used, 3], k[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_cache_of_8_bit_floats_is_as_good_as_the_numbers_in_it(
    kind: torch.dtype, dtype: torch.dtype
) -> None:
    sequences = [(1, 700), (90, 130), (2, 9)]
    q, k, v, table, lengths, starts, k_scale, v_scale = fp8_example(
        CPU, dtype, kind, sequences, (6, 2), 48
    )
    lists = (table, lengths, starts)
    got = ds_ops.paged_attention(q, k, v, *lists, k_scale=k_scale, v_scale=v_scale)
    numbers = k.float() * k_scale[:, None], v.float() * v_scale[:, None]
    truth = ds_ops.paged_attention(q.float(), *numbers, *lists)
    error = float((got.float() - truth).norm() / truth.norm())
    assert error < (1e-6 if dtype is torch.float32 else 4e-3)


def test_every_8_bit_float_is_read_as_torch_reads_it() -> None:
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = torch.arange(256, dtype=torch.uint8).view(kind)
        finite = codes[codes.float().isfinite()]
        cache = torch.zeros(len(finite), 1, 1, 16).to(kind)
        cache[:, 0, 0, 3] = finite
        count = len(finite)
        table = torch.arange(count, dtype=torch.int32)[:, None]
        lengths = torch.ones(count, dtype=torch.int32)
        starts = torch.arange(count + 1, dtype=torch.int32)
        out = ds_ops.paged_attention(
            torch.zeros(count, 1, 16), cache, cache, table, lengths, starts
        )
        assert torch.equal(out[:, 0, 3], finite.float())
    nan = torch.tensor([127], dtype=torch.uint8).view(torch.float8_e4m3fn).expand(1, 1, 1, 16)
    one = torch.ones(1, dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    nan = nan.contiguous()
    out = ds_ops.paged_attention(torch.zeros(1, 1, 16), nan, nan, one[:, None] - 1, one, starts)
    assert out.isnan().all()


def test_what_is_no_tensor_is_refused():
    x = torch.ones(1, 2, 16)
    with pytest.raises(OpError, match="paged_attention: query_starts: got None, expected a tensor"):
        ds_ops.paged_attention(x, x, x, x, x, None)
    with pytest.raises(OpError, match="write_kv_cache_: slots: got None, expected a tensor"):
        ds_ops.write_kv_cache(x, x, x, x, None)
    with pytest.raises(OpError, match="rope_write_kv_cache_: sin: got None, expected a tensor"):
        ds_ops.rope_write_kv_cache(x, x, x, x, None, x, x, x, x)
    with pytest.raises(OpError, match="grouped_mm: offsets: got None, expected a tensor"):
        ds_ops.grouped_mm(x, x, None)
