"""A data loader that knows how far it has come, so that a run resumes with the next sample."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ds_core.data.loader_watch import LoaderWatch
from ds_core.data.plan import BatchPlan, PlannedBatch, PlanState, ShuffledPlan
from ds_core.errors import DsError

Collate = Callable[[list[Any]], Any]


class PlannedLoader:
    """The micro-batches that a plan decides, with a position that is saved and restored.

    Args:
        dataset: map-style.
        plan: of this rank.
        collate_fn: as torch's DataLoader takes it.
        num_workers: processes that read samples ahead; what they have read ahead of the run is
            not counted as seen.
        pin_memory: whether batches are put into page-locked memory, if there is an accelerator.
        num_epochs: `forever` ends after so many; None: never.
        seed: of the numbers that torch's workers start from.

    Attributes:
        step_samples: samples of the present optimizer step over all ranks, where the plan fixes
            them; None before the first batch and for plans that count micro-batches only.
        post_process: called with each batch and, by metric, the present difficulties of a
            curriculum; returns the batch to use instead. None: batches stay as they are.

    Iterating goes through the rest of the present epoch.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        plan: BatchPlan,
        *,
        collate_fn: Collate | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        num_epochs: int | None = None,
        seed: int = 0,
    ) -> None:
        self.plan, self.num_epochs = plan, num_epochs
        self.step_samples: int | None = None
        self.post_process: Callable[[Any, Mapping[str, int]], Any] | None = None
        self._state = plan.start()
        self._batches = _PlannedBatches()
        self._loader = DataLoader(
            dataset, batch_sampler=self._batches, collate_fn=collate_fn, num_workers=num_workers,
            pin_memory=pin_memory and torch.accelerator.is_available(),
            # Its own, or every epoch, and every resumption, would draw from the model's numbers.
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    def __len__(self) -> int:
        """Micro-batches of a whole epoch."""
        return len(self.plan)

    def __iter__(self) -> Iterator[Any]:
        planned = self._batches.begin(self.plan.epoch(self._state))
        with LoaderWatch(type(self._loader.dataset).__name__) as watch:
            watch.begin()
            for batch in self._loader:
                decided = planned.popleft()
                self._state, self.step_samples = decided.after, decided.step_samples
                if self.post_process is not None:
                    batch = self.post_process(batch, self.difficulties)
                watch.end()
                yield batch
                watch.begin()

    def forever(self) -> Iterator[Any]:
        """Batches of this epoch and of all that follow, up to `num_epochs`."""
        while self.num_epochs is None or self.epochs_done < self.num_epochs:
            yield from self

    @property
    def samples_seen(self) -> int:
        """Samples that all ranks together have passed, since the very first one."""
        return int(self._state["samples_seen"])

    @property
    def epochs_done(self) -> int:
        """Whole passes over as many samples as the dataset has."""
        return self.samples_seen // int(self._state["num_samples"])

    @property
    def difficulties(self) -> dict[str, int]:
        """The present difficulty of each metric of a curriculum; empty without one."""
        return dict(self._state.get("difficulties", {}))

    def state_dict(self) -> PlanState:
        """How far this loader has come, in JSON-able values; alike on all ranks."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the samples that `state` counts, under any number of ranks and batch size.

        Iterators that are under way are not moved: take a new one. Raises DsError if `state` is
        that of another kind of loader.
        """
        self._state = self.plan.adopt(dict(state))


class ResumableLoader(PlannedLoader):
    """Micro-batches of a dataset for one data-parallel rank, shuffled anew in each epoch.

    Args:
        dataset: map-style.
        micro_batch_size: samples per batch and rank.
        rank, num_ranks: of the data-parallel group.
        collate_fn: as torch's DataLoader takes it.
        drop_last: leave out an uneven last batch of an epoch.
        seed: of the permutations; equal on all ranks.
        shuffles: false keeps the dataset's own order.
        num_workers, pin_memory, num_epochs: see `PlannedLoader`.

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
        collate_fn: Collate | None = None,
        drop_last: bool = False,
        seed: int = 0,
        shuffles: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        num_epochs: int | None = None,
    ) -> None:
        plan = ShuffledPlan(
            length_of(dataset), micro_batch_size, rank=rank, num_ranks=num_ranks,
            drop_last=drop_last, seed=seed, shuffles=shuffles,
        )  # fmt: skip
        super().__init__(
            dataset, plan, collate_fn=collate_fn, num_workers=num_workers, pin_memory=pin_memory,
            num_epochs=num_epochs, seed=seed,
        )  # fmt: skip

    def skip_to(self, samples_seen: int) -> None:
        """Go on after that many samples over all ranks, as if they had been iterated."""
        self.load_state_dict({**self.plan.start(), "samples_seen": samples_seen})


class RepeatingLoader:
    """The batches of any loader, over and over: an iterator that does not end.

    Args:
        loader: iterable anew each time, such as torch's DataLoader. If its sampler has
            `set_epoch`, as DistributedSampler, it is told the number of each pass.

    Attributes:
        epoch: passes completed.

    Raises DsError if a pass yields nothing, as one over an iterator that is used up.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.epoch = 0
        self._batches = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __len__(self) -> int:
        """Batches of one pass."""
        return len(self.loader)

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            self.epoch += 1
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        self._batches = iter(self.loader)
        try:
            return next(self._batches)
        except StopIteration:
            raise DsError(
                f"RepeatingLoader: pass {self.epoch + 1} over a {type(self.loader).__name__} gave "
                f"no batch; give it something that can be iterated again, not an iterator"
            ) from None


def length_of(dataset: Dataset[Any]) -> int:
    """Samples of a map-style dataset. Raises DsError if it is empty or has no length."""
    if not hasattr(dataset, "__len__"):
        raise DsError(
            f"training_data: got {type(dataset).__name__}, which has no length; pass a "
            f"map-style dataset, or give an iterator of batches to train_batch instead"
        )
    num_samples = len(dataset)
    if num_samples == 0:
        raise DsError("training_data: the dataset is empty")
    return num_samples


class _PlannedBatches(Sampler[list[int]]):
    """Hands a plan's indices to torch's loader, and notes what it took, in order.

    Workers make the loader take batches ahead; the state of the run is that of the batch that was
    given out last, so each batch carries its own.
    """

    def __init__(self) -> None:
        self._source: Iterator[PlannedBatch] = iter(())
        self._taken: deque[PlannedBatch] = deque()

    def begin(self, source: Iterator[PlannedBatch]) -> deque[PlannedBatch]:
        self._source, self._taken = source, deque()
        return self._taken

    def __iter__(self) -> Iterator[list[int]]:
        # Bound here: an older iteration, abandoned with batches ahead, keeps to its own.
        source, taken = self._source, self._taken
        for planned in source:
            taken.append(planned)
            yield planned.indices
