"""Data loaders under DeepSpeed's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler


class RepeatingLoader:
    """Goes on with a loader from its beginning when it ends, for ever."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.data_iter: Iterator[Any] = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)


class DeepSpeedDataLoader:
    """This rank's micro-batches of a dataset: torch's DataLoader over its DistributedSampler.

    Args:
        dataset: map-style.
        batch_size: samples per micro-batch.
        pin_memory: whether batches are in page-locked memory.
        local_rank: -1 samples for this process alone, at random.
        tput_timer: has `start()`, called before each batch; or None.
        collate_fn: makes a batch of samples; default: torch's.
        num_local_io_workers: processes that load; default: none, the loader works in this one.
        data_sampler: which samples, in which order; default: a shuffled share of this rank, whose
            `set_epoch` chooses the order.
        data_parallel_world_size, data_parallel_rank: of the default sampler.
        dataloader_drop_last: whether an uneven last batch is dropped.
        deepspeed_dataloader_config: not used; `initialize` gives ds_core's own loader where the
            configuration asks for data efficiency.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        pin_memory: bool = False,
        local_rank: int = 0,
        tput_timer: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
        data_sampler: Sampler[Any] | None = None,
        data_parallel_world_size: int | None = None,
        data_parallel_rank: int | None = None,
        dataloader_drop_last: bool = False,
        deepspeed_dataloader_config: Any = None,
    ) -> None:
        sampler: Any = data_sampler
        if sampler is None and local_rank >= 0:
            sampler = DistributedSampler(
                dataset, num_replicas=data_parallel_world_size, rank=data_parallel_rank
            )
        elif sampler is None:
            sampler = RandomSampler(dataset)  # type: ignore[arg-type]
        self.dataset, self.data_sampler, self.tput_timer = dataset, sampler, tput_timer
        self.batch_size, self.collate_fn, self.pin_memory = batch_size, collate_fn, pin_memory
        self.num_local_io_workers = num_local_io_workers or 0
        self.dataloader_drop_last = dataloader_drop_last
        #: Applied to each batch, if set: (batch, state of the sampler or None) -> batch.
        self.post_process_func: Callable[[Any, Any], Any] | None = None
        rounded = math.floor if dataloader_drop_last else math.ceil
        self.len: int = rounded(len(sampler) / batch_size)
        self.data: Iterator[Any] | None = None
        self.dataloader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            pin_memory=pin_memory,
            sampler=sampler,
            num_workers=self.num_local_io_workers,
            drop_last=dataloader_drop_last,
            collate_fn=collate_fn,
        )

    def __iter__(self) -> DeepSpeedDataLoader:
        self.data = iter(self.dataloader)
        return self

    def __len__(self) -> int:
        return self.len

    def __next__(self) -> Any:
        if self.tput_timer is not None:
            self.tput_timer.start()
        if self.data is None:
            iter(self)
        assert self.data is not None
        batch = next(self.data)
        return batch if self.post_process_func is None else self.post_process_func(batch, None)
