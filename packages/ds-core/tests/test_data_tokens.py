"""Token files: what was written is read, by other processes too, and damage is found."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ds_core.data import MegatronTokens, TokenDataset, TokenWindows, write_tokens
from ds_core.errors import DataError
from ds_core.testing import flip_byte, truncate

#: Python 3.12 warns of fork in a process with threads, which is how torch starts its workers.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

DOCUMENTS = [[5, 6, 7], torch.tensor([1, 2]), np.array([], np.int64), [9] * 4]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (70000, "<u4")]
)
def test_documents_come_back_in_as_few_bytes_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
    dataset = write_tokens(tmp_path / "text", iter(DOCUMENTS), vocab_size=vocab_size)
    assert [d.tolist() for d in dataset] == [[5, 6, 7], [1, 2], [], [9] * 4]
    assert dataset.elements.dtype == dtype
    assert dataset.lengths.tolist() == [3, 2, 0, 4]
    assert dataset[-1].tolist() == [9] * 4
    TokenDataset(tmp_path / "text").verify()


def test_windows_cross_documents_and_know_what_follows(tmp_path):
    windows = TokenWindows(write_tokens(tmp_path / "text", DOCUMENTS, vocab_size=10), 4)
    assert len(windows) == 2
    assert [part.tolist() for part in windows[1]] == [[2, 9, 9, 9], [9, 9, 9, 9]]
    batches = list(DataLoader(windows, 2, num_workers=1))
    assert batches[0][0].tolist() == [[5, 6, 7, 1], [2, 9, 9, 9]]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[1], [10]], "document 1: tokens from 10 to 10, expected 0 to 9"),
        ([[-1]], "document 0: tokens from -1"),
    ],
)
def test_a_token_outside_the_vocabulary_is_an_error_and_leaves_nothing(
    tmp_path, documents, message
):
    with pytest.raises(DataError, match=message):
        write_tokens(tmp_path / "text", documents, vocab_size=10)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_overwritten_unless_asked(tmp_path):
    write_tokens(tmp_path / "text", [[1]], vocab_size=10)
    with pytest.raises(DataError, match="exists already"):
        write_tokens(tmp_path / "text", [[2]], vocab_size=10)
    assert write_tokens(tmp_path / "text", [[2]], vocab_size=10, overwrite=True)[0].tolist() == [2]


def test_damage_is_found(tmp_path):
    dataset = write_tokens(tmp_path / "text", DOCUMENTS, vocab_size=10)
    flip_byte(tmp_path / "text" / "tokens.bin", 2)
    with pytest.raises(DataError, match=r"tokens\.bin' is damaged"):
        dataset.verify()
    truncate(tmp_path / "text" / "tokens.bin", 2)
    with pytest.raises(DataError, match="has 7 bytes, expected 9"):
        TokenDataset(tmp_path / "text")


def test_too_few_tokens_for_a_window_say_so(tmp_path):
    with pytest.raises(DataError, match="there are 9 tokens; one window needs 10"):
        TokenWindows(write_tokens(tmp_path / "text", DOCUMENTS, vocab_size=10), 9)


def write_megatron(prefix, documents, code, dtype):
    arrays = [np.array(document, dtype) for document in documents]
    prefix.with_name("m.bin").write_bytes(b"".join(a.tobytes() for a in arrays))
    sizes = np.array([len(a) for a in arrays], np.int32)
    pointers = np.cumsum([0, *[a.nbytes for a in arrays[:-1]]]).astype(np.int64)
    ends = np.arange(len(arrays) + 1, dtype=np.int64)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(arrays), len(ends))
    prefix.with_name("m.idx").write_bytes(
        head + sizes.tobytes() + pointers.tobytes() + ends.tobytes()
    )


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(4, np.int32), (6, np.uint16), (8, np.uint16), (8, np.uint64)],
    ids=["int32", "deepspeed-uint16", "megatron-uint16", "deepspeed-uint64"],
)
def test_megatron_s_files_are_read(tmp_path, code, dtype):
    write_megatron(tmp_path / "m", [[1, 2, 3], [4]], code, dtype)
    tokens = MegatronTokens(tmp_path / "m")
    assert [tokens[i].tolist() for i in range(2)] == [[1, 2, 3], [4]]
    assert [part.tolist() for part in TokenWindows(tokens, 3)[0]] == [[1, 2, 3], [2, 3, 4]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "m.idx").unlink(), "m.idx' does not exist"),
        (lambda f: (f / "m.idx").write_bytes(b"x" * 60), "not an index of Megatron's format"),
        (lambda f: truncate(f / "m.idx", 45), "is cut off: it states 2 sequences"),
        (lambda f: truncate(f / "m.bin", 1), "has 15 bytes, and its index states 4 elements"),
    ],
    ids=["missing", "foreign", "cut-index", "cut-data"],
)
def test_damaged_files_of_megatron_are_an_error(tmp_path, damage, message):
    write_megatron(tmp_path / "m", [[1, 2, 3], [4]], 4, np.int32)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        MegatronTokens(tmp_path / "m")
