"""Number formats of block quantization, and plain-torch arithmetic on their codes.

Here numbers are `[blocks, block]` and wide (fp32, or float64 for tests), codes are int32 of the
same shape, and packed codes are bytes: one stream of bits per block, the first code in its lowest
bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ds_core.errors import OpError

#: The least scale: its inverse is finite.
LEAST_SCALE = 2.0**-126


@dataclass(frozen=True)
class BlockFormat:
    """One format.

    Attributes:
        name: as users write it.
        number: as operators of torch take it.
        bits: of a code.
        exponent_bits: 0 for integers.
        specials: codes at the top that are infinity or NaN.
    """

    name: str
    number: int
    bits: int
    exponent_bits: int = 0
    specials: int = 0

    @property
    def is_float(self) -> bool:
        """Whether codes are a sign, an exponent and a fraction, not an integer."""
        return self.exponent_bits > 0

    @property
    def mantissa_bits(self) -> int:
        """Bits of a float behind its point."""
        return self.bits - 1 - self.exponent_bits

    @property
    def min_exponent(self) -> int:
        """Of a float's smallest normal number."""
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def largest_code(self) -> int:
        """Of a float's largest finite number."""
        return (1 << (self.bits - 1)) - 1 - self.specials

    def largest(self, symmetric: bool = True) -> float:
        """The largest number before the scale is put on it."""
        if not self.is_float:
            return float((1 << (self.bits - symmetric)) - 1)
        units = (self.largest_code & ((1 << self.mantissa_bits) - 1)) + (1 << self.mantissa_bits)
        exponent = (self.largest_code >> self.mantissa_bits) + self.min_exponent - 1
        return float(units * 2.0 ** (exponent - self.mantissa_bits))

    def packed_bytes(self, count: int) -> int:
        """What `count` codes take."""
        return count * self.bits // 8


_BY_NUMBER = (
    BlockFormat("int8", 0, 8),
    BlockFormat("int4", 1, 4),
    BlockFormat("fp8_e4m3", 2, 8, 4, 1),
    BlockFormat("fp8_e5m2", 3, 8, 5, 4),
    BlockFormat("fp6_e3m2", 4, 6, 3),
    BlockFormat("fp6_e2m3", 5, 6, 2),
    BlockFormat("fp4_e2m1", 6, 4, 2),
    BlockFormat("fp12_e4m7", 7, 12, 4),
)
#: By name. The numbers are those of the C++ library's table.
FORMATS: Mapping[str, BlockFormat] = MappingProxyType({fmt.name: fmt for fmt in _BY_NUMBER})


def format_named(op: str, name: str) -> BlockFormat:
    """The format of that name. Raises OpError if there is none."""
    found = FORMATS.get(name)
    if found is None:
        raise OpError(f"{op}: format: got {name!r}, expected one of {', '.join(FORMATS)}")
    return found


def format_numbered(op: str, number: int, symmetric: bool) -> BlockFormat:
    """The format of that number, which must exist with or without zeros as asked."""
    if not 0 <= number < len(_BY_NUMBER):
        raise OpError(f"{op}: format: got {number}, expected 0 to {len(_BY_NUMBER) - 1}")
    found = _BY_NUMBER[number]
    if found.is_float and not symmetric:
        raise OpError(f"{op}: symmetric: got False, which is for int8 and int4 only")
    return found


def check_block(op: str, block: int, width: int, fmt: BlockFormat) -> None:
    """Raise OpError unless blocks of that length divide a row and fill whole bytes."""
    if not 1 <= block < 1 << 31:
        raise OpError(f"{op}: block: got {block}, expected 1 to 2^31 - 1")
    if block * fmt.bits % 8:
        raise OpError(
            f"{op}: block: got {block}, whose codes of {fmt.bits} bits do not fill whole bytes"
        )
    if width % block:
        raise OpError(
            f"{op}: block: got {block}, which does not divide the last dimension, {width}"
        )


# --- Scales ---------------------------------------------------------------------------------------


def scales_of(
    x: torch.Tensor, fmt: BlockFormat, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) of each block, `[blocks]`; a scale is NaN if a number is not finite.

    scale = largest |x| / largest number of the format, at least `LEAST_SCALE`; zero = 0. If not
    symmetric, scale = (largest x - least x) / largest number, and zero = least x.
    """
    finite = x.isfinite().all(1)
    known = torch.where(finite[:, None], x, 0.0)
    zero = x.new_zeros(len(x))
    extent = known.abs().amax(1)
    if not symmetric:
        zero = known.amin(1)
        extent = known.amax(1) - zero
        finite &= extent.isfinite()
        zero = torch.where(finite, zero, 0.0)
    # A product, not a quotient: it is rounded alike on every device.
    scale = (extent * (1.0 / fmt.largest(symmetric))).clamp(min=LEAST_SCALE)
    return torch.where(finite, scale, torch.nan), zero


# --- Codes ----------------------------------------------------------------------------------------


def encode(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    fmt: BlockFormat,
    symmetric: bool,
    seed: int | None,
) -> torch.Tensor:
    """The codes of `(x - zero) / scale`; zeros in blocks whose scale is NaN."""
    known = scale.isfinite()[:, None]
    values = (x - zero[:, None]) * (1.0 / scale)[:, None]
    values = torch.where(known, values, 0.0)
    chance = None if seed is None else uniform(seed, *x.shape, device=x.device)
    if fmt.is_float:
        codes = _float_codes(values, fmt, chance)
    else:
        highest = int(fmt.largest(symmetric))
        codes = _rounded(values, chance).clamp(-highest if symmetric else 0, highest).int()
        codes &= (1 << fmt.bits) - 1
    return torch.where(known, codes, 0)


def decode(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    fmt: BlockFormat,
) -> torch.Tensor:
    """`number of the code * scale + zero`, in the dtype of `scale`; None for symmetric codes."""
    if fmt.is_float:
        values = _float_values(codes, fmt)
    else:
        sign = 0 if zero is not None else 1 << (fmt.bits - 1)
        values = (codes ^ sign) - sign
    product = values.to(scale.dtype) * scale[:, None]
    return product if zero is None else product + zero[:, None]


def _rounded(values: torch.Tensor, chance: torch.Tensor | None) -> torch.Tensor:
    """To the nearest integer, ties to even, or up with the probability of the fraction."""
    if chance is None:
        return values.round()
    low = values.floor()
    return low + (chance < values - low)


def _float_codes(
    values: torch.Tensor, fmt: BlockFormat, chance: torch.Tensor | None
) -> torch.Tensor:
    """With E = max(exponent, that of the smallest normal number), |v| = n * 2^(E - mantissa).

    The code is n, rounded to an integer, behind the exponent E: n's leading one adds 1 to it, if
    there is one, and so does rounding up to the next power of two.
    """
    magnitude = values.abs()
    exponent = (magnitude.frexp().exponent - 1).clamp(min=fmt.min_exponent)
    exponent = torch.where(magnitude == 0, fmt.min_exponent, exponent)
    n = _rounded(magnitude * _power_of_two(fmt.mantissa_bits - exponent), chance).int()
    codes = ((exponent - fmt.min_exponent) << fmt.mantissa_bits) + n
    return codes.clamp(max=fmt.largest_code) | (values.signbit().int() << (fmt.bits - 1))


def _float_values(codes: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """The numbers of codes, exactly, in fp32."""
    magnitude = codes & ((1 << (fmt.bits - 1)) - 1)
    exponent = magnitude >> fmt.mantissa_bits
    fraction = magnitude & ((1 << fmt.mantissa_bits) - 1)
    n = fraction + ((exponent > 0).int() << fmt.mantissa_bits)
    step = exponent.clamp(min=1) + fmt.min_exponent - 1 - fmt.mantissa_bits
    values = n.float() * _power_of_two(step)
    # As of IEEE: all ones in the exponent are infinity, or NaN if there is a fraction.
    special = torch.where(fraction == 0, torch.inf, torch.nan)
    values = torch.where(magnitude > fmt.largest_code, special, values)
    return torch.where(codes >> (fmt.bits - 1) == 1, -values, values)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Exactly, in fp32."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


# --- Random numbers -------------------------------------------------------------------------------


def uniform(seed: int, blocks: int, block: int, *, device: torch.device) -> torch.Tensor:
    """Multiples of 2^-24 in [0, 1), `[blocks, block]`, fp32, of (seed, block, place) alone.

    A key per block by the step of SplitMix64 (Steele, Lea and Flood 2014), and places mixed with it
    in 32 bits.
    """
    counter = torch.arange(1, blocks + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    key = counter + _signed(seed)
    key = (key ^ _shifted(key, 30)) * _signed(0xBF58476D1CE4E5B9)
    key = (key ^ _shifted(key, 27)) * _signed(0x94D049BB133111EB)
    key = (key ^ _shifted(key, 31))[:, None]
    mask = 0xFFFFFFFF
    h = (torch.arange(block, device=device) * 0x9E3779B9 + (key & mask)) & mask
    h = (h ^ (h >> 16)) * 0x21F0AAAD & mask
    h ^= _shifted(key, 32)
    h = (h ^ (h >> 15)) * 0x735A2D97 & mask
    return ((h ^ (h >> 15)) >> 8).float() * 2.0**-24


def _signed(value: int) -> int:
    """The int64 of the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(value: torch.Tensor, by: int) -> torch.Tensor:
    """Right, with zeros moving in."""
    return (value >> by) & ((1 << (64 - by)) - 1)


# --- Packing --------------------------------------------------------------------------------------


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`[blocks, block]` codes as `[blocks, block * bits / 8]` bytes."""
    single = (codes[..., None] >> torch.arange(bits, device=codes.device)) & 1
    rows, count = codes.shape
    return _joined(single.view(rows, count * bits // 8, 8)).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`, as int32."""
    single = (packed[..., None].int() >> torch.arange(8, device=packed.device)) & 1
    rows, count = packed.shape
    return _joined(single.view(rows, count * 8 // bits, bits))


def _joined(single_bits: torch.Tensor) -> torch.Tensor:
    places = torch.arange(single_bits.shape[-1], device=single_bits.device)
    return (single_bits.int() << places.int()).sum(-1, dtype=torch.int32)
