"""quantize, dequantize and quantized_reduce: against the reference, and what users rely on."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

import ds_ops
from ds_core import ops
from ds_core.errors import OpError
from ds_core.ops import block_format, quantize
from ds_core.testing.contracts import OpContract

FORMATS = tuple(block_format.FORMATS)
#: Of a number that is not too small for the format: half the distance to the next, relatively.
_PRECISION = {"fp8_e4m3": 2**-4, "fp8_e5m2": 2**-3, "fp6_e3m2": 2**-3, "fp6_e2m3": 2**-4}
_PRECISION |= {"fp4_e2m1": 2**-2, "fp12_e4m7": 2**-8}


class TestQuantizeBlocks(OpContract):
    op = "quantize_blocks"


class TestQuantizeFeedback(OpContract):
    op = "quantize_feedback_"


class TestDequantizeBlocks(OpContract):
    op = "dequantize_blocks"


class TestQuantizedReduce(OpContract):
    op = "quantized_reduce"
    compiled = False


class TestQuantizedReduceFeedback(OpContract):
    op = "quantized_reduce_feedback_"
    compiled = False


def _numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- What comes back ------------------------------------------------------------------------------


def test_the_formats_are_those_of_the_type() -> None:
    assert get_args(quantize.Format) == FORMATS


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_come_back_to_the_precision_of_the_format(name: str, dtype: torch.dtype) -> None:
    x = _numbers(8, 512, dtype=dtype)
    q = ds_ops.quantize(x, name, block=64)
    assert q.codes.shape == (8, 512 * block_format.FORMATS[name].bits // 8)
    assert q.nbytes == q.codes.nbytes + 4 * 64
    back = ds_ops.dequantize(q)
    assert (back.shape, back.dtype) == (x.shape, dtype)
    lost = (ds_ops.dequantize(q, torch.float32) - x.float()).abs().view(64, 64)
    fmt = block_format.FORMATS[name]
    if fmt.is_float:
        least = 2.0 ** (fmt.min_exponent - fmt.mantissa_bits) * q.scales.view(64, 1)
        allowed = (x.float().abs().view(64, 64) * _PRECISION[name]).maximum(least / 2)
    else:
        allowed = q.scales.view(64, 1) / 2
    assert (lost <= allowed * 1.0001).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_asymmetric_codes_use_the_whole_range(name: str) -> None:
    x = _numbers(4, 256) + 100.0
    q = ds_ops.quantize(x, name, block=32, symmetric=False)
    assert q.zeros is not None
    assert torch.equal(q.zeros, x.view(4, 8, 32).amin(-1))
    lost = (ds_ops.dequantize(q) - x).abs().view(4, 8, 32)
    assert (lost <= q.scales[..., None] * 0.501 + 1e-5).all()
    symmetric = ds_ops.dequantize(ds_ops.quantize(x, name, block=32))
    assert lost.norm() < (symmetric - x).norm() / 5


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)]
)
def test_fp8_codes_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    x = _numbers(64, 1024) * _numbers(64, 1024, seed=1).exp() ** 3
    x[0, :8] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-3, -1e-3, 1e-5, 3e-5])
    q = ds_ops.quantize(x, name, block=128)
    scaled = x.view(-1, 128) * (1.0 / q.scales.view(-1, 1))
    largest = torch.finfo(dtype).max
    expected = scaled.clamp(-largest, largest).to(dtype)
    assert torch.equal(q.codes.view(-1, 128), expected.view(torch.uint8))
    every = torch.arange(256).to(torch.uint8)
    decoded = ds_ops.dequantize(
        ds_ops.quantize(torch.ones(256), name, block=256)._replace(
            codes=every, scales=torch.ones(1)
        )
    )
    assert decoded.nan_to_num(nan=1e9).equal(every.view(dtype).float().nan_to_num(nan=1e9))


def test_int8_codes_view_as_int8() -> None:
    x = torch.tensor([127.0, -127.0, 0.4, -1.5, 2.5, 3.5, -0.6, 1.0])
    q = ds_ops.quantize(x, "int8", block=8)
    assert q.codes.view(torch.int8).tolist() == [127, -127, 0, -2, 2, 4, -1, 1]
    packed = ds_ops.quantize(torch.tensor([7.0, -7.0, 1.0, -1.0]), "int4", block=4)
    assert packed.codes.tolist() == [0x97, 0xF1]


def test_tiny_and_huge_blocks_survive() -> None:
    x = torch.cat([torch.full((8,), 3e38), torch.full((8,), 1e-40), torch.zeros(8)])
    back = ds_ops.dequantize(ds_ops.quantize(x, block=8))
    assert back.isfinite().all()
    assert torch.allclose(back[:8], x[:8], rtol=1e-2)
    assert (back[8:] == 0).all()


# --- What is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_overflow_is_never_hidden(name: str, bad: float) -> None:
    x = _numbers(2, 64)
    x[1, 40] = bad
    error = _numbers(2, 64, seed=2)
    kept = error.clone()
    q = ds_ops.quantize(x, name, block=32, error=error)
    assert q.scales.isnan().tolist() == [[False, False], [False, True]]
    with pytest.raises(RuntimeError, match=r"scales: block 3 of 4 .*propagate=True"):
        ds_ops.dequantize(q)
    back = ds_ops.dequantize(q, propagate=True)
    assert back[1, 32:].isnan().all()
    assert back.isfinite().sum() == 96
    assert error[1, 32:].equal(kept[1, 32:])
    assert error.isfinite().all()
    pieces = q._replace(codes=q.codes[:, None], scales=q.scales[:, None])
    assert ds_ops.quantized_reduce(pieces).scales.isnan().tolist() == [[False, True]]


def test_a_range_beyond_fp32_is_not_finite() -> None:
    x = torch.tensor([3e38, -3e38] * 4)
    assert ds_ops.quantize(x, block=8, symmetric=False).scales.isnan().all()
    assert ds_ops.quantize(x, block=8).scales.isfinite().all()


# --- Stochastic rounding --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.3701, -0.0417, 0.9103, 1e-4])
def test_stochastic_rounding_is_unbiased(name: str, value: float) -> None:
    block, draws = 1024, 1 << 20
    x = torch.full((draws // block, block), value)
    x[:, 0] = 1.0  # so that every block has the scale 1 / largest
    q = ds_ops.quantize(x, name, block=block, rounding="stochastic", seed=1234)
    back = ds_ops.dequantize(q)[:, 1:].double()
    truth = float(torch.tensor(value))
    sigma = float(back.std()) / back.numel() ** 0.5
    assert len(back.unique()) <= 2
    assert abs(float(back.mean()) - truth) <= 4 * sigma + 1e-6 * abs(truth)


def test_asymmetric_stochastic_rounding_is_unbiased() -> None:
    x = _numbers(1, 64).repeat(1 << 14, 1)
    q = ds_ops.quantize(x, "int4", block=64, symmetric=False, rounding="stochastic", seed=5)
    back = ds_ops.dequantize(q).double()
    sigma = back.std(0) / len(back) ** 0.5
    distance = (back.mean(0) - x[0].double()).abs()
    assert (distance <= 4.5 * sigma + 1e-6).all()


def test_seeds_are_reproducible_and_independent() -> None:
    x = torch.full((1 << 18,), 0.5)
    x[::256] = 127.0

    def ups(seed: int | None) -> torch.Tensor:
        q = ds_ops.quantize(x, block=256, rounding="stochastic", seed=seed)
        return q.codes.view(-1, 256)[:, 1:].double().flatten()

    one, same, other = ups(7), ups(7), ups(8)
    assert one.equal(same)
    # Fair coins: of the seeds, of neighbours in a block, and of neighbouring blocks.
    num = one.numel()
    pairs = [(one, other), (one[1:], one[:-1]), (one[255:], one[:-255]), (one[2:], other[:-2])]
    for a, b in pairs:
        correlation = float(((a - 0.5) * (b - 0.5)).mean() * 4)
        assert abs(correlation) < 4.5 / num**0.5
    torch.manual_seed(3)
    drawn = ups(None)
    torch.manual_seed(3)
    assert ups(None).equal(drawn)
    assert not drawn.equal(one)


def test_the_uniform_numbers_are_uniform() -> None:
    u = block_format.uniform(42, 512, 2048, device=torch.device("cpu")).double().flatten()
    counts = torch.histc(u, 256, 0.0, 1.0)
    expected = u.numel() / 256
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi2 - 255) < 4.5 * (2 * 255) ** 0.5
    assert abs(float(u.mean()) - 0.5) < 4.5 / (12 * u.numel()) ** 0.5


# --- Error feedback and swizzle -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4", "fp4_e2m1", "int8"])
def test_error_feedback_loses_nothing_over_time(name: str) -> None:
    error = torch.zeros(4, 128)
    sent, told = torch.zeros(4, 128), torch.zeros(4, 128)
    for step in range(50):
        x = _numbers(4, 128, seed=step) * 0.1 + 0.01
        q = ds_ops.quantize(x, name, block=64, error=error)
        sent += x
        told += ds_ops.dequantize(q)
    # All that is missing is what is in `error` now.
    assert torch.allclose(told + error, sent, atol=1e-4)


def test_a_moving_average_of_errors_is_as_its_formula_says() -> None:
    x, error = _numbers(2, 64), _numbers(2, 64, seed=1) / 16
    before = error.clone()
    q = ds_ops.quantize(x, "int4", block=32, error=error, beta=0.8)
    lost = x + before - ds_ops.dequantize(q)
    assert torch.allclose(error, 0.8 * before + 0.2 * lost, atol=1e-6)


def test_swizzle_puts_parts_for_the_same_place_together() -> None:
    x = _numbers(24, 64)
    plain, turned = (ds_ops.quantize(x, block=32, swizzle=s) for s in (None, (4, 3)))
    expected = plain.codes.view(4, 3, 2, 64).transpose(0, 1).reshape(24, 64)
    assert turned.codes.equal(expected)
    assert turned.scales.equal(plain.scales.view(4, 3, 4).transpose(0, 1).reshape(24, 2))


# --- Reduce ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_reduce_is_the_sum_of_what_the_pieces_stand_for(mean: bool, symmetric: bool) -> None:
    pieces = ds_ops.quantize(_numbers(4, 6, 256), "int8", block=64, symmetric=symmetric)
    reduced = ds_ops.quantized_reduce(pieces, mean=mean)
    dense = ds_ops.dequantize(pieces).double().sum(0) / (4 if mean else 1)
    assert reduced.codes.shape == (6, 256)
    assert (reduced.zeros is None) == symmetric
    lost = (ds_ops.dequantize(reduced) - dense).abs().view(6, 4, 64)
    assert (lost <= reduced.scales[..., None] * 0.501).all()


def test_reduce_may_change_the_format_and_feed_back_its_error() -> None:
    pieces = ds_ops.quantize(_numbers(2, 256), "int4", block=64)
    error = torch.zeros(256)
    reduced = ds_ops.quantized_reduce(pieces, format="fp8_e4m3", error=error)
    assert (reduced.format, reduced.codes.shape) == ("fp8_e4m3", (256,))
    dense = ds_ops.dequantize(pieces).sum(0)
    assert torch.allclose(ds_ops.dequantize(reduced) + error, dense, atol=1e-5)


# --- Use ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_public_functions_compile_into_one_graph() -> None:
    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        q = ds_ops.quantize(x, "int8", block=64, rounding="stochastic", seed=3)
        pieces = q._replace(codes=q.codes[None], scales=q.scales[None])
        return ds_ops.dequantize(ds_ops.quantized_reduce(pieces, mean=True))

    x = _numbers(4, 128)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), there_and_back(x))


def test_words_that_mean_nothing_are_refused() -> None:
    x = _numbers(2, 64)
    with pytest.raises(OpError, match="format: got 'int3', expected one of int8, int4"):
        ds_ops.quantize(x, "int3")
    with pytest.raises(OpError, match="rounding: got up"):
        ds_ops.quantize(x, block=32, rounding="up")
    with pytest.raises(OpError, match="seed: got 3, expected None"):
        ds_ops.quantize(x, block=32, seed=3)
    with pytest.raises(OpError, match="seed: got 99999999999999999999"):
        ds_ops.quantize(x, block=32, rounding="stochastic", seed=99999999999999999999)


def test_an_error_that_overlaps_is_refused() -> None:
    x = _numbers(128)
    with pytest.raises(RuntimeError, match="error and x overlap"):
        ds_ops.quantize(x[:64], block=32, error=x[32:96])


def test_threads_share_the_work_without_a_trace() -> None:
    x = _numbers(3, 1 << 17, dtype=torch.bfloat16)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            args = (x, 6, 1 << 10, True, 77, 1, 1)
            results.append(ops.run("quantize_blocks", *args))
        finally:
            torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
