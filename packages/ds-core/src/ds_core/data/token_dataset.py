"""Tokenized documents on disk: built once, mapped into memory by every process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from ds_core.data.stored_arrays import ArrayFolder, StoredArrays
from ds_core.errors import DataError

_KIND = "ds-core tokens"


class Tokens(Protocol):
    """Documents and all their tokens in a row: a `TokenDataset`, or a `MegatronTokens`."""

    elements: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> torch.Tensor: ...


class TokenDataset(Dataset[torch.Tensor]):
    """Documents of a folder that `write_tokens` made; item i is document i, `[length]`, int64.

    Attributes:
        lengths: tokens per document, `[num_documents]`.
        elements: tokens of all documents, one after the other, `[n]`, mapped.

    Raises DataError if the folder is missing or not as it was written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._stored = StoredArrays(path, _KIND)
        self.elements, self._ends = self._stored.array("tokens"), self._stored.array("ends")
        self.lengths = np.diff(self._ends, prepend=0)

    def __len__(self) -> int:
        """Documents."""
        return len(self._ends)

    def __getitem__(self, index: int) -> torch.Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        found = self.elements[start : int(self._ends[index])]
        return torch.from_numpy(found.astype(np.int64))

    def verify(self) -> None:
        """Read every byte. Raises DataError if a file is not as it was written."""
        self._stored.verify()


class TokenWindows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Stretches of `length` tokens, side by side, across documents, each with what follows it.

    Args:
        tokens: a `TokenDataset` or `MegatronTokens`.
        length: tokens per window.

    Item i is (inputs, targets), both `[length]`, int64; targets are the inputs one token later.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        if length < 1 or len(tokens.elements) <= length:
            raise DataError(
                f"windows of {length} tokens: there are {len(tokens.elements)} tokens; one window "
                f"needs {length + 1}"
            )
        self._elements, self._length = tokens.elements, length

    def __len__(self) -> int:
        """Windows; what is left over at the end is not used."""
        return (len(self._elements) - 1) // self._length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self._length
        found = self._elements[start : start + self._length + 1]
        window = torch.from_numpy(found.astype(np.int64))
        return window[:-1], window[1:]


def write_tokens(
    path: str | os.PathLike[str],
    documents: Iterable[Any],
    *,
    vocab_size: int,
    overwrite: bool = False,
) -> TokenDataset:
    """Write documents as they come, and open what was written.

    Args:
        path: a folder to make; it appears when it is whole.
        documents: each a list, array or 1-d tensor of token ids.
        vocab_size: number of token ids; decides the bytes per token on disk (1, 2 or 4).
        overwrite: replace a folder that is there.

    Raises DataError if the folder exists, or for a token outside the vocabulary.
    """
    folder = ArrayFolder(Path(path), _KIND, replaces=overwrite)
    ends: list[int] = []

    def pieces() -> Iterator[np.ndarray]:
        total = 0
        for number, document in enumerate(documents):
            values = np.asarray(document).reshape(-1)
            if len(values) and not (values.min() >= 0 and values.max() < vocab_size):
                raise DataError(
                    f"document {number}: tokens from {values.min()} to {values.max()}, expected "
                    f"0 to {vocab_size - 1}"
                )
            total += len(values)
            ends.append(total)
            yield values

    try:
        folder.write("tokens", pieces(), np.min_scalar_type(max(0, vocab_size - 1)))
        folder.write_array("ends", np.array(ends, np.int64))
        return TokenDataset(folder.publish(vocab_size=vocab_size))
    except BaseException:
        folder.discard()
        raise
