"""Real text for the jobs: the source of the standard library, as windows of bytes or tokens."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.utils.data import Dataset

#: Modules that every Python has; about 400 kB.
FILES = ("argparse.py", "ast.py", "inspect.py", "pathlib.py", "tarfile.py", "typing.py")


def text() -> str:
    """The text of all files."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in FILES)


def of_bytes(words: str) -> list[int]:
    """One token per byte, for models without a tokenizer."""
    return list(words.encode())


class Windows(Dataset):
    """`count` stretches of `length` tokens, spread over the text, as the Trainer wants them."""

    def __init__(
        self,
        count: int,
        length: int,
        tokenize: Callable[[str], Sequence[int]] = of_bytes,
        skip: int = 0,
    ) -> None:
        words = text()
        spacing = len(words) // (skip + count)
        # Four characters are a token at the least in every tokenizer that the jobs use.
        pieces = [words[i * spacing :][: 8 * length] for i in range(skip, skip + count)]
        self._ids = [list(tokenize(piece))[:length] for piece in pieces]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}
