"""Weights of linear layers packed in 8, 6 or 4 bits, with a scale for each group of inputs."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch

from ds_core.ops.arguments import FLOATS, expect, expect_shape, expect_tensors, expect_together

#: Outputs that are packed side by side, and what the size of a group is a multiple of.
BLOCK = 16
#: Bits of a code by format.
BITS: Mapping[str, int] = MappingProxyType({"int8": 8, "fp8_e4m3": 8, "fp6_e3m2": 6, "int4": 4})
#: Formats of floats: the number of the largest finite code.
_LARGEST = {"fp8_e4m3": 448, "fp6_e3m2": 28}
_OP = "quantize_weight"


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight `[out, in]` of a linear layer: `weight[o, k] = (value(code) - zero) * scale`.

    Outputs lie in blocks of 16, of which the last is filled up with zeros: a kernel reads a block's
    codes in order, and finds the codes of 16 outputs for the same inputs in one vector.

    Attributes:
        codes: int8 `[out / 16, in, 16]` for int8; uint8 of that shape for fp8_e4m3: the bytes of
            float8_e4m3fn, none NaN (a module's `.to(dtype)` leaves bytes as they are); int32
            `[out / 16, in / 8, 16]` for int4: 8 codes of consecutive inputs in two's complement,
            the first in the lowest bits; int32 `[out / 16, in / 16, 3, 16]` for fp6_e3m2: 16 codes
            of consecutive inputs as 96 bits, from the lowest of the first word on. The last
            dimension counts outputs.
        scales: `[out / 16, in / group, 16]`, fp32, bf16 or fp16, finite.
        zeros: as scales, or None where all are 0.
        shape: (out, in).
        format: "int8", "int4", "fp8_e4m3" (sign, 4 bits of exponent with bias 7, 3 of mantissa) or
            "fp6_e3m2" (sign, 3 bits of exponent with bias 3, 2 of mantissa).
        group: inputs that share a scale.

    Raises OpError where these do not fit together, or a code, scale or zero is NaN or infinite.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    shape: tuple[int, int]
    format: str
    group: int

    def __post_init__(self) -> None:
        expect(self.format in BITS, _OP, "format", self.format, ", ".join(BITS))
        expect(min(self.shape) >= 1, _OP, "shape", list(self.shape), "[out, in] of 1 or more")
        check_group(self.group, self.shape[1])
        check_packed(_OP, self.codes, self.scales, self.zeros, *self.shape, self.bits)
        kind = _codes_dtype(self.format)
        expect(self.codes.dtype == kind, _OP, "codes", self.codes.dtype, kind)
        groups = self.shape[1] // self.group
        expect(self.scales.shape[1] == groups, _OP, "group", self.group, f"{groups} groups' scales")
        for argument, t in (("scales", self.scales), ("zeros", self.zeros)):
            if t is not None and not bool(t.isfinite().all()):
                expect(False, _OP, argument, "NaN or infinity", "finite numbers")
        if self.format == "fp8_e4m3" and bool(((self.codes & 127) == 127).any()):
            expect(False, _OP, "codes", "NaN", "bytes of finite numbers of float8_e4m3fn")

    @property
    def bits(self) -> int:
        """Of a code."""
        return BITS[self.format]

    @property
    def nbytes(self) -> int:
        """Of codes, scales and zeros."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.codes.nbytes + self.scales.nbytes + zeros

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as a matrix `[out, in]`."""
        return unpack(self.codes, self.scales, self.zeros, self.shape[0], self.bits).to(dtype)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """All of it as tensors, to be saved: codes, scales, zeros if any, and `shape`.

        `shape` holds out, in and the bits of a code, int64 `[3]`.
        """
        found = {"codes": self.codes, "scales": self.scales}
        found["shape"] = torch.tensor([*self.shape, self.bits])
        return found if self.zeros is None else {**found, "zeros": self.zeros}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """What `to_tensors` was called on; the codes are copied to large pages (see `room`)."""
        out, depth, bits = (int(n) for n in tensors["shape"])
        expect(bits in BITS.values(), _OP, "shape", bits, "bits of a code: 8, 6 or 4")
        scales = tensors["scales"]
        expect(scales.dim() == 3, _OP, "scales", f"shape {list(scales.shape)}", "3 dimensions")
        group = depth // max(scales.shape[1], 1)
        codes = room(tensors["codes"].shape, tensors["codes"].dtype, scales.device)
        codes.copy_(tensors["codes"])
        format = format_of(_OP, codes, bits)
        return cls(codes, scales, tensors.get("zeros"), (out, depth), format, group)


def quantize_weight(
    w: torch.Tensor,
    format: str = "int8",
    *,
    group: int = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantizedWeight:
    """The weight of a linear layer in 8, 6 or 4 bits, each number the nearest there is.

    Args:
        w: `[out, in]`, fp32, bf16 or fp16, finite.
        format: "int8" (-127 to 127), "int4" (-8 to 7; the largest weight of a group becomes -8),
            "fp8_e4m3" (up to 448 in steps of 1/512 to 32) or "fp6_e3m2" (up to 28 in steps of 1/16
            to 4).
        group: inputs that share a scale: a multiple of 16 that divides `in`.
        symmetric: whether the zero of every group is 0; False: a group's range is that from its
            least to its largest weight, which costs a second number per group. Integers only.
        scale_dtype: of the scales: fp32, bf16 or fp16. Codes are found with the scales as stored.

    Raises OpError for what does not fit.
    """
    expect_tensors(_OP, w=w)
    expect(w.device.type != "meta", _OP, "w", "a tensor without data (meta)", "one with data")
    expect(w.dtype in FLOATS, _OP, "w", w.dtype, "torch.float32, torch.bfloat16 or torch.float16")
    expect(w.dim() == 2 and w.numel() > 0, _OP, "w", f"shape {list(w.shape)}", "[out, in]")
    expect(format in BITS, _OP, "format", format, ", ".join(BITS))
    expect(scale_dtype in FLOATS, _OP, "scale_dtype", scale_dtype, "fp32, bf16 or fp16")
    expect(symmetric or format not in _LARGEST, _OP, "symmetric", symmetric, f"True for {format}")
    out, depth = w.shape
    check_group(group, depth)
    expect(bool(w.isfinite().all()), _OP, "w", "NaN or infinity", "finite weights")
    parts = w.detach().float().view(out, depth // group, group)
    scales, zeros = _scales(parts, format, symmetric, scale_dtype)
    levels = parts / scales.float().unsqueeze(-1)
    if format == "fp6_e3m2":
        values = _fp6_code(levels)
    elif format == "fp8_e4m3":
        # The scale as stored may be a little smaller than it should be.
        values = levels.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        if zeros is not None:
            levels += zeros.float().unsqueeze(-1)
        most = 2 ** (BITS[format] - 1) - 1
        least = -most if format == "int8" and symmetric else -most - 1
        values = levels.round().clamp(least, most).to(torch.int32)
    return QuantizedWeight(
        _packed(values.view(out, depth), format),
        _blocked(scales),
        None if zeros is None else _blocked(zeros),
        (out, depth),
        format,
        group,
    )


def _scales(
    parts: torch.Tensor, format: str, symmetric: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zeros `[out, groups]` of weights `[out, groups, group]`."""
    if symmetric:
        largest = parts.abs().amax(-1)
        if format == "int4":
            largest = torch.where(parts.amax(-1) == largest, -largest, largest)
        scales = (largest / {"int8": 127, "int4": 8, **_LARGEST}[format]).to(dtype)
        return torch.where(scales == 0, 1, scales), None
    least, most = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scales = ((most - least) / (2 ** BITS[format] - 1)).to(dtype)
    scales = torch.where(scales == 0, 1, scales)
    return scales, (-(2 ** (BITS[format] - 1)) - least / scales.float()).round().to(dtype)


def check_group(group: int, depth: int) -> None:
    """Raise OpError unless groups of that size divide `depth` inputs."""
    fits = group >= BLOCK and group % BLOCK == 0 and depth % group == 0
    expect(fits, _OP, "group", group, f"a multiple of {BLOCK} that divides the {depth} inputs")


def check_packed(
    op: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    outputs: int,
    depth: int,
    bits: int,
) -> None:
    """Raise OpError unless tensors are a packed weight of that size."""
    format_of(op, codes, bits)
    expect(outputs >= 1, op, "outputs", outputs, "1 or more")
    blocks = -(-outputs // BLOCK)
    shape = f"shape {list(scales.shape)}"
    fits = scales.dim() == 3 and scales.shape[::2] == (blocks, BLOCK) and scales.shape[1] >= 1
    expect(fits, op, "scales", shape, f"[{blocks}, groups, {BLOCK}] for {outputs} outputs")
    groups = scales.shape[1]
    fits = depth >= BLOCK and depth % groups == 0 and depth // groups % BLOCK == 0
    expect(fits, op, "scales", shape, f"groups of a multiple of {BLOCK} of {depth} inputs")
    expect_shape(op, "codes", codes, codes_shape(outputs, depth, bits))
    expect(scales.is_floating_point(), op, "scales", scales.dtype, "a float dtype")
    expect_together(op, codes, scales=scales, zeros=zeros)
    if zeros is not None:
        expect(zeros.dtype == scales.dtype, op, "zeros", zeros.dtype, scales.dtype)
        expect_shape(op, "zeros", zeros, scales.shape)


def format_of(op: str, codes: torch.Tensor, bits: int) -> str:
    """The format of codes of so many bits. Raises OpError if there is none."""
    expect(bits in BITS.values(), op, "bits", bits, "8, 6 or 4")
    dtypes = {_codes_dtype(name): name for name, count in BITS.items() if count == bits}
    allowed = " or ".join(map(str, dtypes))
    expect(codes.dtype in dtypes, op, "codes", codes.dtype, allowed)
    return dtypes[codes.dtype]


def codes_shape(outputs: int, depth: int, bits: int) -> tuple[int, ...]:
    """The shape of the codes of a weight `[outputs, depth]`."""
    blocks = -(-outputs // BLOCK)
    inner = {8: (depth,), 4: (depth // 8,), 6: (depth // 16, 3)}[bits]
    return (blocks, *inner, BLOCK)


# --- Packing and unpacking ------------------------------------------------------------------------


def _blocked(t: torch.Tensor) -> torch.Tensor:
    """`[out, n]` as `[blocks, n, 16]`, with zeros for outputs behind the last."""
    blocks = -(-t.shape[0] // BLOCK)
    full = t.new_zeros(blocks * BLOCK, t.shape[1])
    full[: t.shape[0]] = t
    return full.view(blocks, BLOCK, -1).transpose(1, 2).contiguous()


def _packed(values: torch.Tensor, format: str) -> torch.Tensor:
    """The codes of integers `[out, depth]`, of which only as many low bits as a code has count."""
    bits = BITS[format]
    out, depth = values.shape
    codes = room(codes_shape(out, depth, bits), _codes_dtype(format), values.device)
    blocked = _blocked(values)
    if bits == 8:
        return codes.copy_(blocked)
    per_word = 8 if bits == 4 else 16
    parts = (blocked & (1 << bits) - 1).view(len(blocked), -1, per_word, BLOCK)
    words = torch.zeros_like(codes).view(len(blocked), parts.shape[1], -1, BLOCK)
    for j in range(per_word):
        word, bit = divmod(j * bits, 32)
        words[:, :, word] |= parts[:, :, j] << bit
        if bit + bits > 32:
            words[:, :, word + 1] |= parts[:, :, j] >> (32 - bit)
    return codes.copy_(words.view_as(codes))


def _codes_dtype(format: str) -> torch.dtype:
    return {"int8": torch.int8, "fp8_e4m3": torch.uint8}.get(format, torch.int32)


def unpack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    outputs: int,
    bits: int,
) -> torch.Tensor:
    """The weight `[outputs, in]` in fp32, or float64 if the scales are."""
    dtype = torch.float64 if scales.dtype is torch.float64 else torch.float32
    values = _values(codes, bits).to(dtype)
    blocks, depth, _ = values.shape
    grouped = values.view(blocks, scales.shape[1], -1, BLOCK)
    if zeros is not None:
        grouped = grouped - zeros.to(dtype).unsqueeze(2)
    weight = (grouped * scales.to(dtype).unsqueeze(2)).view(blocks, depth, BLOCK)
    return weight.transpose(1, 2).reshape(-1, depth)[:outputs]


def _values(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """What codes stand for, `[blocks, depth, 16]`."""
    if bits == 8:
        return codes.view(torch.float8_e4m3fn) if codes.dtype is torch.uint8 else codes
    if bits == 4:
        shifts = torch.arange(28, -1, -4, device=codes.device, dtype=torch.int32).view(8, 1)
        # To the top of the word and down again: the sign comes along.
        return ((codes.unsqueeze(2) << shifts) >> 28).flatten(1, 2)
    words = codes.long() & 0xFFFFFFFF
    parts = []
    for j in range(16):
        word, bit = divmod(6 * j, 32)
        part = words[:, :, word] >> bit
        if bit > 26:
            part = part | words[:, :, word + 1] << (32 - bit)
        parts.append(part & 63)
    code = torch.stack(parts, 2).flatten(1, 2)
    sizes = _fp6_sizes().to(codes.device)
    return torch.cat((sizes, -sizes))[code]


@cache
def _fp6_sizes() -> torch.Tensor:
    """The 32 numbers of fp6_e3m2 that are not negative, by their code."""
    codes = torch.arange(32)
    exponent, mantissa = codes >> 2, (codes & 3) / 4
    normal = torch.exp2(exponent.float() - 3) * (1 + mantissa)
    return torch.where(exponent == 0, mantissa / 4, normal)


def _fp6_code(levels: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest numbers of fp6_e3m2, of two equally near ones the even code."""
    sizes = _fp6_sizes().to(levels.device)
    halves = (sizes[:-1] + sizes[1:]) / 2
    # What lies on a limit gets the lower code: right behind an even one, else the limit is lowered.
    lower = torch.nextafter(halves, torch.zeros_like(halves))
    limits = torch.where(torch.arange(31, device=halves.device) % 2 == 0, halves, lower)
    sign = (levels < 0).to(torch.int32) << 5
    return torch.bucketize(levels.abs(), limits, out_int32=True) | sign


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor; one of 4 MiB or more on a Linux CPU lies on pages of 2 MiB.

    A weight that is read once per token is read up to 1.5 times as fast from them: with pages of
    4 KiB the processor waits for page tables. Where the kernel has none left, pages are small.
    """
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    if device.type != "cpu" or sys.platform != "linux" or size < 4 << 20:
        return torch.empty(shape, dtype=dtype, device=device)
    page = 2 << 20
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory`
    begin = -whole.data_ptr() % page
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(shape)
