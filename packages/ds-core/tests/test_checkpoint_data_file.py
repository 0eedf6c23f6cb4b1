from __future__ import annotations

import io
import zlib

import pytest
import torch
from safetensors.torch import load as safetensors_load

from ds_core.checkpoint.data_file import (
    BLOCK_BYTES,
    Entry,
    block_checksums,
    dtype_code,
    dtype_of,
    read_header,
    write_data_file,
)
from ds_core.errors import CheckpointError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def written(tensors: dict[str, torch.Tensor]):
    entries = [Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    values = list(tensors.values())
    file = io.BytesIO()
    stored = write_data_file(file, entries, values.__getitem__)
    return file.getvalue(), stored


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_safetensors_reads_every_dtype_back(dtype):
    tensor = (torch.arange(15).reshape(3, 5) % 7).to(dtype)
    data, _ = written({"t": tensor})
    back = safetensors_load(data)["t"]
    assert back.dtype == dtype
    assert raw(back) == raw(tensor)
    assert dtype_of(dtype_code(dtype, "t")) == dtype


def test_scalars_empty_and_strided_tensors_are_written_by_value():
    tensors = {
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
    }
    data, stored = written(tensors)
    back = safetensors_load(data)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor.detach()), name
    assert [at.nbytes for at in stored] == [4, 0, 48, 8, 8]
    for name, at in zip(tensors, stored, strict=True):
        assert data[at.start : at.start + at.nbytes] == raw(back[name])


def test_checksums_are_per_block():
    tensor = torch.arange(BLOCK_BYTES, dtype=torch.int16)  # two blocks
    data, [stored] = written({"t": tensor})
    first = data[stored.start : stored.start + BLOCK_BYTES]
    assert len(stored.crc32) == 2
    assert stored.crc32[0] == zlib.crc32(first)
    assert list(stored.crc32) == block_checksums(data[stored.start :])


def test_tensor_that_differs_from_its_plan_is_refused():
    entry = Entry("w", torch.float32, (2,))
    with pytest.raises(CheckpointError, match=r"w: planned as torch\.float32 \[2\].*float64 \[3\]"):
        write_data_file(io.BytesIO(), [entry], lambda i: torch.zeros(3, dtype=torch.float64))


def test_dtype_without_a_code_is_refused_by_name():
    with pytest.raises(
        CheckpointError, match=r"cannot save w: safetensors has no torch\.complex128"
    ):
        dtype_code(torch.complex128, "w")
    with pytest.raises(CheckpointError, match="unknown dtype 'F7'"):
        dtype_of("F7")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "does not start with a header's length", id="empty"),
        pytest.param(b"\xff" * 16, "does not start with a header's length", id="absurd-length"),
        pytest.param(b"\x02\0\0\0\0\0\0\0{", "header is damaged", id="cut-off"),
        pytest.param(b"\x02\0\0\0\0\0\0\0[]", "header is cut off", id="not-a-header"),
    ],
)
def test_damaged_header_is_refused(data, message):
    with pytest.raises(CheckpointError, match=message):
        read_header(io.BytesIO(data))
