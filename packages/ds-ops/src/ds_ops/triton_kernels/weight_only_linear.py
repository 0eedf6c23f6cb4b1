"""Linear layers on packed weights: a kernel for one row, and one with products of matrices.

One row waits for the weight alone. A program takes the 16 outputs of one block, whose codes are one
stream in memory: each byte is read once, 16 or more at a time, and becomes numbers in the thread
that read it. An H200 brings a multiprocessor 21 bytes per clock, 41 weights of int4 for its 128
instructions. So int4 takes three: it is shifted and masked into the fraction of a float in [1, 2),
multiplied, and what is too much by that is taken off with the sum of x, once for 8 weights. With
few outputs for the device the inputs are cut into parts, which a second kernel adds up in their
order.

More rows are products of tiles. Each thread makes the words that it reads into neighbours of x's
dtype, which go to the product's memory 16 bytes at a time; a tile is read once for 16, 64 or 128
rows.

The CPU's layout serves here as it is: 64 bytes and more in a row at any place, and a thread's words
hold neighbouring inputs, as products want them. The layouts of torch's own kernels
(`_weight_int4pack_mm`, `_weight_int8pack_mm`) differ from it and from each other: they would need a
second copy of the weight or work in each call, so that none of them is an implementation.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ds_core.ops import weight_only_linear as op
from ds_core.ops.quantized_weight import BLOCK, format_of
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.targets import MATRIX, processors
from ds_ops.triton_kernels.weight_only_programs import (
    FORMATS,
    INPUTS_PER_UNIT,
    add_parts,
    linear_many,
    linear_one,
)

#: Units that a program reads at a time: 16 to 48 bytes per thread, three times ahead.
_UNITS = {"int8": 256, "fp8_e4m3": 256, "fp6_e3m2": 64, "int4": 128}
#: Steps of a product that are worth a program.
_STEPS = 4
_SHORT = Config({"M": 16, "N": 64, "K": 128}, {"rows": 16}, warps=4, stages=3)
_LONG = (
    Config({"M": 64, "N": 128, "K": 64}, {"rows": 64}, warps=4, stages=3),
    Config({"M": 128, "N": 128, "K": 64}, warps=8, stages=2),
)
#: Of a tile of 16 rows, which the widest instructions do not have.
_NARROW = {**MATRIX, "sm_90": "mma.sync", "sm_100": "mma.sync"}
_CODES = {"int8": "*i8", "fp8_e4m3": "*u8", "fp6_e3m2": "*i32", "int4": "*i32"}


def _types(format: str, **constants: int | bool) -> dict[str, str | int | bool]:
    return types(
        {
            "*bf16": "x scales zeros bias y",
            _CODES[format]: "codes",
            "i32": "parts" if "BACKWARD" not in constants else "rows parts",
            "i32:16": "outputs depth",
        },
        **constants,
        GROUP=128,
        FORMAT=FORMATS[format],
        PER_UNIT=INPUTS_PER_UNIT[format],
        ZEROS=format == "int4",
    )


_ONE = {
    name: Kernel(
        linear_one,
        (Config({"UNITS": units, "AHEAD": 3}, {"rows": 1}, warps=8),),
        _types(name, BIASED=False),
        variant=name,
    )
    for name, units in _UNITS.items()
}
_SHORT_TILES, _LONG_TILES = (
    {
        name: Kernel(
            linear_many,
            configs,
            _types(name, BIASED=False, BACKWARD=False),
            instructions,
            variant=f"{name} {kind}",
        )
        for name in FORMATS
    }
    for kind, configs, instructions in (("short", (_SHORT,), _NARROW), ("long", _LONG, MATRIX))
)
_BACKWARD = {
    name: Kernel(
        linear_many,
        (Config({"M": 128, "N": 64, "K": 128}, warps=8, stages=2),),
        _types(name, BIASED=False, BACKWARD=True),
        MATRIX,
        variant=f"{name} backward",
    )
    for name in FORMATS
}
#: Of fp32, which no matrix instruction multiplies as exactly.
_WIDE, _WIDE_BACKWARD = (
    {
        name: Kernel(
            linear_many,
            (Config({"M": 32, "N": 64, "K": 16}, warps=4, stages=2),),
            {
                **_types(name, BIASED=False, BACKWARD=backward),
                **types({"*fp32": "x bias y"}),
            },
            variant=f"{name} fp32{' backward' if backward else ''}",
        )
        for name in FORMATS
    }
    for backward in (False, True)
)
_ADD = Kernel(
    add_parts,
    (Config({"BLOCK": 512}, warps=4),),
    types(
        {"*fp32": "parts", "*bf16": "bias y", "i32": "count", "i32:16": "size width"}, BIASED=True
    ),
)


def _fitting(config: Config, group: int) -> Config:
    """The config, with as many inputs at a time as have one scale."""
    together = min(config.constants["K"], group & -group)
    return replace(config, constants={**config.constants, "K": together})


#: As calls with other groups have them, which are worth a compilation of their own.
_BRIEF = (
    replace(
        kernel,
        configs=tuple(_fitting(config, 96) for config in kernel.configs),
        types={**kernel.types, "GROUP": 96},
        variant=f"{kernel.variant} group 96",
    )
    for kernel in (_BACKWARD["int4"], _BACKWARD["fp6_e3m2"])
)
KERNELS = (
    *_ONE.values(),
    *_SHORT_TILES.values(),
    *_LONG_TILES.values(),
    *_BACKWARD.values(),
    *(_WIDE["int4"], _WIDE_BACKWARD["int4"]),
    *_BRIEF,
    _ADD,
)


def weight_only_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    bits: int,
) -> torch.Tensor:
    """As `ds_core.ops.weight_only_linear.reference`."""
    y = op.fake(x, codes, scales, zeros, bias, outputs, bits)
    expect_plain(op.NAME, x=x, codes=codes, scales=scales, zeros=zeros, bias=bias)
    depth = x.shape[-1]
    rows = x.numel() // depth
    format = format_of(op.NAME, codes, bits)
    group = depth // scales.shape[1]
    if rows == 1:
        kernel = _ONE[format]
        config = kernel.config(op.NAME, x.device, rows=rows)
        tiles = blocks(outputs, BLOCK)
        steps = blocks(depth // INPUTS_PER_UNIT[format], config.constants["UNITS"])
        parts = min(max(1, 2 * processors(x.device) // tiles), steps)
        sizes: tuple[int, ...] = (outputs, depth)
        direction: dict[str, bool] = {}
    else:
        few = rows <= _SHORT.up_to["rows"]
        kernel = (_WIDE if x.dtype is torch.float32 else _SHORT_TILES if few else _LONG_TILES)[
            format
        ]
        config = _fitting(kernel.config(op.NAME, x.device, rows=rows), group)
        tiles = blocks(rows, config.constants["M"]) * blocks(outputs, config.constants["N"])
        parts = _parts(tiles, depth // config.constants["K"], x.device)
        sizes, direction = (rows, outputs, depth), {"BACKWARD": False}
    _run(
        *(kernel, config, (tiles, parts), (x, codes, scales, zeros, bias, y)),
        *(sizes, group, format, direction),
    )
    return y


def weight_only_linear_backward(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    inputs: int,
    bits: int,
) -> torch.Tensor:
    """As `ds_core.ops.weight_only_linear.backward_reference`."""
    name = "weight_only_linear_backward"
    dx = op.backward_fake(grad, codes, scales, zeros, inputs, bits)
    expect_plain(name, grad=grad, codes=codes, scales=scales, zeros=zeros)
    outputs = grad.shape[-1]
    rows = grad.numel() // outputs
    format = format_of(name, codes, bits)
    group = inputs // scales.shape[1]
    kernel = (_WIDE_BACKWARD if grad.dtype is torch.float32 else _BACKWARD)[format]
    config = _fitting(kernel.config(name, grad.device, rows=rows), group)
    tiles = blocks(rows, config.constants["M"]) * (inputs // config.constants["K"])
    parts = _parts(tiles, blocks(outputs, config.constants["N"]), grad.device)
    _run(
        *(kernel, config, (tiles, parts), (grad, codes, scales, zeros, None, dx)),
        *((rows, outputs, inputs), group, format, {"BACKWARD": True}),
    )
    return dx


def _run(
    kernel: Kernel,
    config: Config,
    grid: tuple[int, int],
    tensors: tuple[torch.Tensor | None, ...],
    sizes: tuple[int, ...],
    group: int,
    format: str,
    direction: dict[str, bool],
) -> None:
    """Launch a kernel, and what adds up its parts if there is more than one."""
    x, codes, scales, zeros, bias, y = tensors
    assert x is not None
    assert y is not None
    if y.numel() == 0:
        return
    parts = grid[1]
    whole = parts == 1
    to = y if whole else torch.empty((parts, y.numel()), dtype=torch.float32, device=y.device)
    constants = {
        **direction,
        "GROUP": group,
        "FORMAT": FORMATS[format],
        "PER_UNIT": INPUTS_PER_UNIT[format],
        "ZEROS": zeros is not None,
        "BIASED": whole and bias is not None,
    }
    zeros = scales if zeros is None else zeros
    added = x if bias is None else bias
    launch(kernel, config, grid, x, codes, scales, zeros, added, to, *sizes, parts, **constants)
    if not whole:
        adding = _ADD.config(op.NAME, y.device)
        launch(
            *(_ADD, adding, (blocks(y.numel(), adding.constants["BLOCK"]),)),
            *(to, added, y, y.numel(), y.shape[-1], parts),
            BIASED=bias is not None,
        )


def _parts(tiles: int, steps: int, device: torch.device) -> int:
    """Into how many parts sums are cut, so that a device has enough to do."""
    return min(max(1, processors(device) // max(tiles, 1)), max(1, steps // _STEPS))
