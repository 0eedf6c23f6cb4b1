"""A data loader that knows how far it has come, so that a run resumes with the next sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ds_core.errors import DsError


class _RankSampler(Sampler[int]):
    """This rank's part of each epoch's permutation, from a position on."""

    def __init__(self, num_samples: int, rank: int, num_ranks: int, seed: int) -> None:
        self.num_samples, self.rank, self.num_ranks, self.seed = num_samples, rank, num_ranks, seed
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        # Every rank gets the same number of samples, or ranks would run out of step: the first
        # few are repeated at the end.
        while len(order) % self.num_ranks:
            order.append(order[len(order) - self.num_samples])
        return iter(order[self.start + self.rank :: self.num_ranks])

    def __len__(self) -> int:
        return -(-self.num_samples // self.num_ranks)


class ResumableLoader:
    """Micro-batches of a dataset for one data-parallel rank, shuffled anew in each epoch.

    Args:
        dataset: map-style.
        micro_batch_size: samples per batch and rank.
        rank, num_ranks: of the data-parallel group.
        collate_fn: as torch's DataLoader takes it.
        drop_last: leave out an uneven last batch of an epoch.
        seed: of the permutations; equal on all ranks.

    Iterating goes through the rest of the present epoch. Raises DsError for a dataset that is empty
    or has no length.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        micro_batch_size: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        if not hasattr(dataset, "__len__"):
            raise DsError(
                f"training_data: got {type(dataset).__name__}, which has no length; pass a "
                f"map-style dataset, or give an iterator of batches to train_batch instead"
            )
        num_samples = len(dataset)
        if num_samples == 0:
            raise DsError("training_data: the dataset is empty")
        self._sampler = _RankSampler(num_samples, rank, num_ranks, seed)
        self._loader = DataLoader(
            dataset, micro_batch_size, sampler=self._sampler, collate_fn=collate_fn,
            drop_last=drop_last,
            # Its own, or every epoch, and every resumption, would draw from the model's numbers.
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        if drop_last and len(self) == 0:
            raise DsError(
                f"training_data: {num_samples} samples are less than one micro-batch of "
                f"{micro_batch_size} on each of {num_ranks} ranks; lower the batch size"
            )
        self._global_batch = micro_batch_size * num_ranks
        self._epoch_samples = len(self) * self._global_batch
        #: Samples that all ranks together have been given, since the very first one.
        self.samples_seen = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._sampler.epoch = self.samples_seen // self._epoch_samples
        self._sampler.start = self.samples_seen % self._epoch_samples
        for batch in self._loader:
            self.samples_seen += self._global_batch
            yield batch
        self._sampler.start = 0

    def forever(self) -> Iterator[Any]:
        """Batches of this epoch and of all that follow."""
        while True:
            yield from self

    def skip_to(self, samples_seen: int) -> None:
        """Go on after that many samples, as if they had been iterated."""
        # A different global batch than the one that saved: round down to whole batches.
        self.samples_seen = samples_seen // self._global_batch * self._global_batch
