"""Fashion-MNIST: 70,000 pictures of clothes, 28 x 28 grey values, ten classes, as tensors."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

#: Where Debian's package dataset-fashion-mnist puts it.
FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
#: Mean and standard deviation of the training pictures' grey values, as parts of 255.
MEAN, DEVIATION = 0.2860, 0.3530


def read(folder: Path, kind: str, count: int | None = None) -> TensorDataset:
    """Pairs of a picture `[1, 28, 28]`, float32 of mean 0 and deviation 1, and its class.

    Args:
        folder: holds the four `.gz` files.
        kind: "train" (60,000) or "t10k" (10,000).
        count: how many, from the beginning; None: all.
    """
    pictures = _numbers(folder / f"{kind}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    classes = _numbers(folder / f"{kind}-labels-idx1-ubyte.gz", 8)
    x = torch.from_numpy(pictures[:count].copy()).float().div_(255)
    y = torch.from_numpy(classes[:count].copy()).long()
    return TensorDataset(x.sub_(MEAN).div_(DEVIATION), y)


def _numbers(path: Path, header_bytes: int) -> np.ndarray:
    if not path.exists():
        raise SystemExit(
            f"{path} is not there; install Debian's package dataset-fashion-mnist, or say with "
            f"--data where the four files of Fashion-MNIST are"
        )
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header_bytes)
