"""Block quantization and its inverse, and the quantized sum of quantized numbers.

A program holds whole blocks in its registers, so that each byte is moved once; of blocks that are
longer, what is quantized is read twice, the second time mostly from the caches. Codes and errors
are equal to the reference's, bit for bit.

`dequantize` of scales that are not finite is an error unless it is told to propagate them, for
which the host waits for the device. In a CUDA graph and in what torch.compile makes nothing can be
waited for: such blocks are then NaN, as if it had been told to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ds_core.ops import block_format as bf
from ds_core.ops import quantize as op
from ds_core.ops import quantized_reduce as reduce_op
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch, tracing
from ds_ops.triton_kernels.quantize_programs import (
    dequantize_tile,
    quantize_tile,
)

# --- Configs --------------------------------------------------------------------------------------

#: Blocks are numbered with 32 bits, also those of the last program that are none.
_BLOCKS = 2**31 - 16


def _config(rows: int, block: int, warps: int) -> Config:
    """Of blocks that are no longer; about 16 numbers for each thread."""
    sizes = {"block": block, "blocks": _BLOCKS}
    return Config({"ROWS": rows, "BLOCK": block, "WHOLE": 1}, sizes, warps)


_CONFIGS = (
    *(_config(16, 128, 4), _config(4, 512, 4), _config(1, 2048, 4)),
    Config({"ROWS": 1, "BLOCK": 1024, "WHOLE": 0}, {"blocks": _BLOCKS}, warps=4),
)
_TILES = tuple(
    Config({"ROWS": rows, "BLOCK": block}, sizes | {"blocks": _BLOCKS})
    for rows, block, sizes in ((16, 128, {"block": 128}), (4, 512, {"block": 512}), (1, 2048, {}))
)


def _format(number: int, prefix: str = "") -> dict[str, int]:
    """The constants of a format."""
    fmt = bf.format_numbered(op.QUANTIZE, number, True)
    found = {"BITS": fmt.bits, "EXPONENT": fmt.exponent_bits, "SPECIALS": fmt.specials}
    return {prefix + name: value for name, value in found.items()}


_NUMBERS = dict.fromkeys(("X_BITS", "X_EXPONENT", "X_SPECIALS", "X_ASYMMETRIC"), 0)
_SIZES = {
    "i32": "blocks ranks outer inner",
    "i32:16": "block x_length length",
    "i64": "seed",
    "fp32": "factor beta inverse_max nothing",
}
_RESULTS = {"*fp32": "x_scales x_zeros error scales zeros", "*u8": "codes"}


def _quantizing(
    variant: str, configs: tuple[Config, ...], x: str, constants: dict[str, int], *flags: str
) -> Kernel:
    names = ("FEEDBACK", "ASYMMETRIC", "STOCHASTIC", "SWIZZLED")
    constants |= {name: int(name in flags) for name in names}
    by_type = types({**_RESULTS, **_SIZES}, **constants) | {"x": x}
    return Kernel(quantize_tile, configs, by_type, variant=variant)


#: The first is launched; the others are what else is compiled ahead of time of its function.
_QUANTIZE = _quantizing("int8", _CONFIGS, "*bf16", _NUMBERS | _format(0))
_FP6 = _quantizing(
    "fp6", _CONFIGS[::3], "*bf16", _NUMBERS | _format(4), "FEEDBACK", "STOCHASTIC", "SWIZZLED"
)
_SUM = _quantizing(
    "sum",
    _CONFIGS[::3],
    "*u8",
    {**_format(1, "X_"), "X_ASYMMETRIC": 1, **_format(1)},
    *("FEEDBACK", "ASYMMETRIC", "STOCHASTIC"),
)
_DEQUANTIZE, _FP12 = (
    Kernel(
        dequantize_tile,
        configs,
        types(
            {
                "*u8": "codes",
                "*fp32": "scales zeros",
                "*bf16": "y",
                "i32": "blocks",
                "i32:16": "block length",
                "fp32": "nothing",
            },
            **_format(number),
            ASYMMETRIC=0,
        ),
        variant=name,
    )
    for name, number, configs in (("int8", 0, _TILES), ("fp12", 7, _TILES[:1]))
)
KERNELS = (_QUANTIZE, _FP6, _SUM, _DEQUANTIZE, _FP12)


# --- Launches -------------------------------------------------------------------------------------


def quantize_blocks(
    x: torch.Tensor,
    format: int,
    block: int,
    symmetric: bool,
    seed: int | None,
    outer: int,
    inner: int,
) -> op.Results:
    """As `ds_core.ops.quantize.reference`."""
    results = op.fake(x, format, block, symmetric, seed, outer, inner)
    expect_plain(op.QUANTIZE, x=x)
    _quantize(op.QUANTIZE, x, None, 0.0, results, format, block, symmetric, seed, outer, inner)
    return results


def quantize_feedback_(
    x: torch.Tensor,
    error: torch.Tensor,
    beta: float,
    format: int,
    block: int,
    symmetric: bool,
    seed: int | None,
    outer: int,
    inner: int,
) -> op.Results:
    """As `ds_core.ops.quantize.feedback_reference`."""
    results = op.feedback_fake(x, error, beta, format, block, symmetric, seed, outer, inner)
    expect_plain(op.FEEDBACK, x=x, error=error)
    _quantize(op.FEEDBACK, x, error, beta, results, format, block, symmetric, seed, outer, inner)
    return results


def quantized_reduce(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: int,
    block: int,
    mean: bool,
    to_format: int,
    to_symmetric: bool,
    seed: int | None,
) -> op.Results:
    """As `ds_core.ops.quantized_reduce.reference`."""
    rest = (format, block, mean, to_format, to_symmetric, seed)
    results = reduce_op.fake(codes, scales, zeros, *rest)
    _reduce(reduce_op.NAME, (codes, scales, zeros), None, 0.0, results, *rest)
    return results


def quantized_reduce_feedback_(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    error: torch.Tensor,
    beta: float,
    format: int,
    block: int,
    mean: bool,
    to_format: int,
    to_symmetric: bool,
    seed: int | None,
) -> op.Results:
    """As `ds_core.ops.quantized_reduce.feedback_reference`."""
    rest = (format, block, mean, to_format, to_symmetric, seed)
    results = reduce_op.feedback_fake(codes, scales, zeros, error, beta, *rest)
    expect_plain(reduce_op.FEEDBACK, error=error)
    _reduce(reduce_op.FEEDBACK, (codes, scales, zeros), error, beta, results, *rest)
    return results


def _quantize(
    name: str,
    x: torch.Tensor,
    error: torch.Tensor | None,
    beta: float,
    results: op.Results,
    format: int,
    block: int,
    symmetric: bool,
    seed: int | None,
    outer: int,
    inner: int,
) -> None:
    given = (x, results[1], results[1])
    rest = (format, block, symmetric, seed)
    _run(name, given, _NUMBERS, error, beta, results, *rest, swizzle=(outer, inner))


def _reduce(
    name: str,
    pieces: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    error: torch.Tensor | None,
    beta: float,
    results: op.Results,
    format: int,
    block: int,
    mean: bool,
    to_format: int,
    to_symmetric: bool,
    seed: int | None,
) -> None:
    codes, scales, zeros = pieces
    expect_plain(name, codes=codes, scales=scales, zeros=zeros)
    given = (codes, scales, scales if zeros is None else zeros)
    constants = _format(format, "X_") | {"X_ASYMMETRIC": int(zeros is not None)}
    ranks = len(codes)
    factor = 1.0 / ranks if mean else 1.0
    rest = (to_format, block, to_symmetric, seed)
    _run(name, given, constants, error, beta, results, *rest, ranks=ranks, factor=factor)


def _run(
    name: str,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    constants: Mapping[str, int],
    error: torch.Tensor | None,
    beta: float,
    results: op.Results,
    format: int,
    block: int,
    symmetric: bool,
    seed: int | None,
    *,
    ranks: int = 1,
    factor: float = 1.0,
    swizzle: tuple[int, int] = (1, 1),
) -> None:
    """Quantize what is given, whose format `constants` say."""
    codes, scales, zeros = results
    count = scales.numel()
    config = _QUANTIZE.config(name, codes.device, block=block, blocks=count)
    fmt = bf.format_numbered(name, format, symmetric)
    launch(
        _QUANTIZE,
        config,
        (blocks(count, config.constants["ROWS"]),),
        *(*given, scales if error is None else error),
        *(codes, scales, scales if symmetric else zeros, count, block),
        *(constants["X_BITS"] * block // 8, fmt.packed_bytes(block), ranks, factor, beta),
        *(1.0 / fmt.largest(symmetric), seed or 0, *swizzle, -0.0),
        **constants,
        **_format(format),
        FEEDBACK=error is not None,
        ASYMMETRIC=not symmetric,
        STOCHASTIC=seed is not None,
        SWIZZLED=1 not in swizzle,
    )


def dequantize_blocks(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: int,
    block: int,
    dtype: torch.dtype,
    propagate: bool,
) -> torch.Tensor:
    """As `ds_core.ops.quantize.dequantize_reference`."""
    y = op.dequantize_fake(codes, scales, zeros, format, block, dtype, propagate)
    expect_plain(op.DEQUANTIZE, codes=codes, scales=scales, zeros=zeros, y=y)
    waits = not (tracing() or (codes.is_cuda and torch.cuda.is_current_stream_capturing()))
    if waits and not propagate:
        op.check_finite(scales, zeros)
    fmt = bf.format_numbered(op.DEQUANTIZE, format, zeros is None)
    count = scales.numel()
    config = _DEQUANTIZE.config(op.DEQUANTIZE, codes.device, block=block, blocks=count)
    rows, width = config.constants["ROWS"], config.constants["BLOCK"]
    launch(
        _DEQUANTIZE,
        config,
        (blocks(count, rows) * blocks(block, width),),
        *(codes, scales, scales if zeros is None else zeros, y, count, block),
        *(fmt.packed_bytes(block), -0.0),
        **_format(format),
        ASYMMETRIC=zeros is not None,
    )
    return y
