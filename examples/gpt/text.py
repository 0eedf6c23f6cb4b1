"""Tokens of the text: a byte-level BPE trained on it once, cached, and windows to learn from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from corpus import Corpus
from errors import ExampleError
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Comes after each file, so that the model learns where a text ends.
END = "<|end|>"
#: Part of the cache's key: raise it when the way to tokenize changes.
_FORMAT = 1
_TEXTS_PER_CALL = 256


@dataclass(frozen=True)
class Tokens:
    """A tokenized corpus.

    Attributes:
        digest: names the text and its tokenization.
        train, heldout: token ids, `[n]`, mapped from a file.
        bytes_of: number of bytes of text that each token id stands for, `[vocabulary]`.
    """

    digest: str
    train: np.ndarray
    heldout: np.ndarray
    bytes_of: torch.Tensor

    @property
    def vocab_size(self) -> int:
        return len(self.bytes_of)


class Windows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Stretches of `length` tokens, side by side, each with the tokens that follow.

    Args:
        tokens: ids, `[n]`.
        length: tokens per window.
        multiple_of: windows at the end are left out until their number is a multiple of it.
    """

    def __init__(self, tokens: np.ndarray, length: int, *, multiple_of: int = 1) -> None:
        self._tokens, self._length = tokens, length
        count = max(0, len(tokens) - 1) // length
        self._count = count - count % multiple_of

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * self._length
        window = torch.from_numpy(self._tokens[start : start + self._length + 1].astype(np.int64))
        return window[:-1], window[1:]


def prepare(corpus: Corpus, vocab_size: int, cache: Path) -> str:
    """Tokenize a corpus unless `cache` has it; returns its digest, for `load`.

    The same text gives the same tokens, on any machine. One process only.
    """
    digest = _digest(corpus, vocab_size)
    target = cache / f"text-{digest}"
    if (target / "train.npy").exists():
        return digest
    tokenizer = _trained(corpus.train, vocab_size)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"text-{digest}.", dir=cache))
    try:
        tokenizer.save(str(temporary / "tokenizer.json"))
        for name, texts in (("heldout", corpus.heldout), ("train", corpus.train)):
            np.save(temporary / f"{name}.npy", _encoded(tokenizer, texts))
        shutil.rmtree(target, ignore_errors=True)
        # Renamed when it is complete: an interrupted run leaves nothing that looks finished.
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return digest


def load(cache: Path, digest: str) -> Tokens:
    """The tokens that `prepare` wrote."""
    folder = cache / f"text-{digest}"
    train, heldout = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "heldout")
    )
    return Tokens(digest, train, heldout, _bytes_of_tokens(load_tokenizer(folder)))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder. Raises ExampleError if there is none."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ExampleError(f"{str(path)!r} does not exist: no run has been started in that folder")
    return _tokenizers().Tokenizer.from_file(str(path))


def _digest(corpus: Corpus, vocab_size: int) -> str:
    parts = [corpus.train, corpus.heldout, vocab_size, _FORMAT]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _trained(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of these texts: any text can be encoded, and decodes to itself."""
    lib = _tokenizers()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    end = tokenizer.token_to_id(END)

    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            for encoding in tokenizer.encode_batch_fast(texts[start : start + _TEXTS_PER_CALL]):
                yield np.array([*encoding.ids, end], dtype=dtype)

    return np.concatenate(list(pieces()))


def _bytes_of_tokens(tokenizer: Tokenizer) -> torch.Tensor:
    # In the vocabulary of a byte-level BPE every character stands for one byte.
    sizes = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        sizes[index] = 0 if token == END else len(token)
    return sizes


def _tokenizers() -> ModuleType:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ExampleError(
            "the package tokenizers is not installed: "
            "python -m pip install -r examples/gpt/requirements.txt"
        ) from error
    return tokenizers
