"""quantize_weight: how weights are rounded, packed, kept and refused."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch

from ds_core.errors import OpError
from ds_core.ops.quantized_weight import _fp6_code, _fp6_sizes, room
from ds_ops import QuantizedWeight, quantize_weight

FORMATS = ("int8", "int4", "fp8_e4m3", "fp6_e3m2")


def _weight(out: int = 37, depth: int = 96) -> torch.Tensor:
    return torch.randn(out, depth, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_errs_by_half_a_step_at_most(format: str) -> None:
    w = _weight()
    found = quantize_weight(w, format, group=32, scale_dtype=torch.float32)
    largest = w.view(37, 3, 32).abs().amax(-1, keepdim=True)
    # A scale of int4 reaches from -8 to 7: the largest of the other sign is off by a whole step.
    steps = {"int8": 0.5 / 127, "int4": 1 / 8, "fp8_e4m3": 16 / 448, "fp6_e3m2": 2 / 28}[format]
    assert ((found.dequantize() - w).view(37, 3, 32).abs() <= largest * steps * 1.001).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_zeros_serve_weights_that_are_all_positive(format: str) -> None:
    w = _weight().abs() + 0.5
    errors = [
        float((quantize_weight(w, format, group=48, symmetric=s).dequantize() - w).norm())
        for s in (False, True)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_numbers_that_a_format_has_come_back_exactly() -> None:
    sizes = _fp6_sizes()
    row = torch.cat((sizes, -sizes)).view(1, 64)
    assert torch.equal(quantize_weight(row, "fp6_e3m2", group=64).dequantize(), row)
    bytes_ = torch.arange(256, dtype=torch.uint8)
    row = bytes_[(bytes_ & 127) != 127].view(torch.float8_e4m3fn).float()
    row = torch.cat((row, row[:2])).view(1, 256)
    assert torch.equal(quantize_weight(row, "fp8_e4m3", group=256).dequantize(), row)
    whole = torch.arange(-8, 8.0).view(1, 16)
    assert torch.equal(quantize_weight(whole, "int4", group=16).dequantize(), whole)
    bytes_ = torch.linspace(-127, 127, 16).round().view(1, 16)
    assert torch.equal(quantize_weight(bytes_, "int8", group=16).dequantize(), bytes_)


def test_fp6_rounds_to_the_nearest_and_ties_to_even() -> None:
    halfway = (_fp6_sizes()[:-1] + _fp6_sizes()[1:]) / 2
    codes = _fp6_code(halfway)
    assert (codes % 2 == 0).all()
    above = _fp6_code(torch.nextafter(halfway, torch.tensor(100.0)))
    assert torch.equal(above, torch.arange(1, 32, dtype=torch.int32))


def test_a_group_of_zeros_stays_zeros() -> None:
    for format in FORMATS:
        assert (quantize_weight(torch.zeros(3, 32), format, group=16).dequantize() == 0).all()


def test_sizes_are_those_of_the_format() -> None:
    w = torch.ones(32, 128)
    for format, bits in (("int8", 8), ("fp8_e4m3", 8), ("fp6_e3m2", 6), ("int4", 4)):
        assert quantize_weight(w, format).codes.nbytes == w.numel() * bits // 8


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_saved_and_loaded_as_tensors(format: str) -> None:
    weight = quantize_weight(_weight(), format, group=48, symmetric=format.startswith("fp"))
    file = io.BytesIO()
    torch.save(weight.to_tensors(), file)
    file.seek(0)
    again = QuantizedWeight.from_tensors(torch.load(file))
    assert (again.shape, again.format, again.group) == (weight.shape, format, 48)
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_large_weights_lie_on_large_pages() -> None:
    t = room((3, 1 << 20), torch.int32, torch.device("cpu"))
    assert t.data_ptr() % (2 << 20) == 0
    assert t.shape == (3, 1 << 20)
    file = io.BytesIO()
    torch.save(t.zero_(), file)
    assert file.tell() < t.nbytes + 4096


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("w: got torch.int32", {"w": torch.ones(2, 32, dtype=torch.int32)}),
        ("w: got shape", {"w": torch.ones(32)}),
        ("w: got NaN or infinity", {"w": torch.full((2, 32), float("nan"))}),
        ("format: got int3", {"format": "int3"}),
        ("group: got 24", {"group": 24}),
        ("group: got 64", {"group": 64}),
        ("group: got 0", {"group": 0}),
        ("symmetric", {"format": "fp6_e3m2", "symmetric": False}),
        ("symmetric.*True for fp8_e4m3", {"format": "fp8_e4m3", "symmetric": False}),
        ("scale_dtype: got torch.int8", {"scale_dtype": torch.int8}),
    ],
)
def test_what_cannot_be_packed_is_refused(message: str, changes: dict[str, object]) -> None:
    arguments = {"w": torch.ones(2, 32), "format": "int4", "group": 16, **changes}
    with pytest.raises(OpError, match=message):
        quantize_weight(**arguments)  # type: ignore[arg-type]


def test_broken_tensors_are_refused_when_they_are_loaded() -> None:
    tensors = quantize_weight(_weight(), "int8", group=48).to_tensors()
    bad = tensors["scales"].clone()
    bad[0, 0, 0] = float("nan")
    with pytest.raises(OpError, match="scales: got NaN"):
        QuantizedWeight.from_tensors({**tensors, "scales": bad})
    with pytest.raises(OpError, match="codes: got shape"):
        QuantizedWeight.from_tensors({**tensors, "codes": tensors["codes"][:1]})
    with pytest.raises(
        OpError, match=r"codes: got torch\.int32, expected torch\.int8 or torch\.uint8"
    ):
        QuantizedWeight.from_tensors({**tensors, "codes": tensors["codes"].int()})
    tensors = quantize_weight(_weight(), "fp8_e4m3", group=48).to_tensors()
    bad = tensors["codes"].clone()
    bad[1, 2, 3] = 255
    with pytest.raises(OpError, match="codes: got NaN"):
        QuantizedWeight.from_tensors({**tensors, "codes": bad})


def test_codes_of_another_format_are_refused() -> None:
    weight = quantize_weight(_weight(), "int8", group=48)
    with pytest.raises(OpError, match=r"codes: got torch\.int8, expected torch\.uint8"):
        dataclasses.replace(weight, format="fp8_e4m3")
