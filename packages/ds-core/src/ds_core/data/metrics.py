"""Ready metrics of a sample, for `analyze`: how long it is, how rare its words, how hard it is.

A metric is any function from a sample of the dataset to one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ds_core.errors import DataError
from ds_core.seams.runner import loss_of

Metric = Callable[[Any], float]


def tokens_of(sample: Any) -> torch.Tensor:
    """The token ids of a sample: itself, its "input_ids", or its first item; `[length]`.

    Raises DataError if that is no list or tensor of integers.
    """
    found = sample
    if isinstance(sample, Mapping):
        found = sample.get("input_ids", next(iter(sample.values()), None))
    elif isinstance(sample, tuple) and sample:
        found = sample[0]
    tensor = torch.as_tensor(found) if isinstance(found, list | np.ndarray) else found
    if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point():
        raise DataError(
            f"a sample of type {type(sample).__name__} has no token ids as its only, first or "
            f'"input_ids" part; give a metric of your own, a function from sample to number'
        )
    return tensor.reshape(-1)


def sequence_length(sample: Any) -> int:
    """Tokens of a sample."""
    return tokens_of(sample).numel()


class VocabularyRarity:
    """How rare a sample's tokens are: minus the sum of the logarithms of their frequencies.

    Args:
        counts: how often each token id occurs in the whole dataset, `[vocab_size]`; see
            `count_tokens`.

    Source: Li et al. 2022, "DeepSpeed Data Efficiency" (2212.03597), section 3.1.
    """

    def __init__(self, counts: np.ndarray) -> None:
        frequencies = np.maximum(counts, 1) / max(1, counts.sum())
        self._surprise = -np.log(frequencies)

    def __call__(self, sample: Any) -> float:
        return float(self._surprise[tokens_of(sample).numpy()].sum())


class SampleLoss:
    """The loss of a trained, small model on a sample alone.

    Args:
        model: called as the engine would call it with a batch of one; returns a loss.

    Mean over the sample's tokens if the model's loss is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.no_grad()
    def __call__(self, sample: Any) -> float:
        self._model.eval()
        batch = torch.utils.data.default_collate([sample])
        if isinstance(batch, Mapping):
            return float(loss_of(self._model(**batch)))
        if isinstance(batch, list | tuple):
            return float(loss_of(self._model(*batch)))
        return float(loss_of(self._model(batch)))


def count_tokens(dataset: Dataset[Any], vocab_size: int) -> np.ndarray:
    """How often each token id occurs in a dataset, `[vocab_size]`, int64.

    Raises DataError for a token id outside the vocabulary.
    """
    counts = np.zeros(vocab_size, np.int64)
    for index in range(len(dataset)):  # type: ignore[arg-type]
        found = np.bincount(tokens_of(dataset[index]).numpy(), minlength=vocab_size)
        if len(found) > vocab_size:
            raise DataError(
                f"sample {index} has token id {len(found) - 1}, and vocab_size is {vocab_size}"
            )
        counts += found
    return counts
