"""Micro-batches of at most so many tokens, and a learning rate that follows their size."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ds_core.data.plan import PlannedBatch, PlanState, needs_keys
from ds_core.errors import DataError, DsError

logger = logging.getLogger(__name__)

#: Micro-batches of a stretch that is sorted by length at a time.
_BUCKET_BATCHES = 64

Order = Literal["dataloader", "random", "seqlen", "bucketed"]
LrScaling = Literal["linear", "sqrt", "none"]


class TokenBudgetPlan:
    """Packs samples, in order, into micro-batches of at most `max_tokens` tokens.

    All ranks take the same number of micro-batches: those of an epoch's last step are split until
    there are enough, or left out where they cannot be.

    Args:
        lengths: tokens of each sample, `[num_samples]`.
        max_tokens: of a micro-batch, padding not counted. Longer samples are left out, which is
            logged once.
        accumulation: micro-batches per optimizer step and rank.
        rank, num_ranks: of the data-parallel group.
        min_samples, max_samples: of a micro-batch; max_samples None: no limit.
        order: as the dataset has them; shuffled anew in each epoch; by ascending length; or
            "bucketed": shuffled, but with neighbours of like length, so that little is padding.
        seed: of the shuffling; equal on all ranks.
        verbose: whether each epoch's packing is logged.

    Raises DataError if lengths, budget and least number of samples cannot be had together.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        max_tokens: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
        min_samples: int = 1,
        max_samples: int | None = None,
        order: Order = "dataloader",
        seed: int = 0,
        verbose: bool = False,
    ) -> None:
        self.lengths, self.max_tokens = np.asarray(lengths), max_tokens
        self.rank, self.num_ranks, self.group = rank, num_ranks, num_ranks * accumulation
        self.min_samples, self.max_samples = min_samples, max_samples
        self.order, self.seed, self.verbose = order, seed, verbose
        self._kept = np.flatnonzero(self.lengths <= max_tokens)
        if left_out := len(self.lengths) - len(self._kept):
            logger.warning(
                "%d of %d samples have more than max_tokens = %d tokens and are left out, such as "
                "sample %d with %d",
                left_out, len(self.lengths), max_tokens, int(np.argmax(self.lengths)),
                int(self.lengths.max()),
            )  # fmt: skip
        self._num_steps = sum(1 for _ in self._steps(0, 0, seed))
        if not self._num_steps:
            raise DataError(
                f"{len(self._kept)} samples do not fill one step of {self.group} micro-batches of "
                f"at least {min_samples} samples; lower max_tokens or min_batch_size"
            )

    def __len__(self) -> int:
        return self._num_steps * self.group // self.num_ranks

    def start(self) -> PlanState:
        return {
            "samples_seen": 0, "num_samples": len(self._kept), "seed": self.seed,
            "step_done": 0, "micro_batches": self.group,
        }  # fmt: skip

    def adopt(self, state: PlanState) -> PlanState:
        needs_keys(state, self.start())
        if state["num_samples"] != len(self._kept):
            raise DataError(
                f"{state['num_samples']} samples were packed when this was saved, and now "
                f"{len(self._kept)} are; keep dataset and max_tokens, or start anew"
            )
        if state["step_done"] and state["micro_batches"] != self.group:
            logger.warning("the batch size has changed in the middle of a step, which begins anew")
            state = {**state, "step_done": 0}
        return {**state, "micro_batches": self.group}

    def epoch(self, state: PlanState) -> Iterator[PlannedBatch]:
        epoch, position = divmod(state["samples_seen"], len(self._kept))
        steps = self._steps(epoch, position, state["seed"])
        step = next(steps, None)
        if step is None:  # saved under fewer ranks: what is left does not fill a step of these
            epoch, position = epoch + 1, 0
            steps = self._steps(epoch, 0, state["seed"])
            step = next(steps)
        done, start = state["step_done"], epoch * len(self._kept)
        while step is not None:
            following = next(steps, None)
            count = sum(map(len, step))
            position = len(self._kept) if following is None else position + count
            after = {**state, "samples_seen": start + position, "step_done": 0}
            mine = step[self.rank :: self.num_ranks]
            for number in range(done, len(mine)):
                is_last = number + 1 == len(mine)
                under_way = {**state, "step_done": number + 1}
                yield PlannedBatch(mine[number], after if is_last else under_way, count)
            state, step, done = after, following, 0

    def _steps(self, epoch: int, position: int, seed: int) -> Iterator[list[list[int]]]:
        """The micro-batches of all ranks, step by step, from a position in the epoch's order."""
        packed = self._long_enough(self._micro_batches(epoch, position, seed))
        counts: list[int] = []
        while step := list(itertools.islice(packed, self.group)):
            if len(step) < self.group and not self._split(step):
                break
            counts.append(sum(map(len, step)))
            yield step
        if self.verbose and counts:
            logger.info(
                "epoch %d: %d steps of %d to %d samples, %d of %d samples used",
                epoch, len(counts), min(counts), max(counts), sum(counts),
                len(self._kept) - position,
            )  # fmt: skip

    def _micro_batches(self, epoch: int, position: int, seed: int) -> Iterator[list[int]]:
        """The micro-batches of an epoch from the sample at `position` on."""
        generator = np.random.default_rng([seed, epoch])
        if self.order == "bucketed":
            yield from _without_first(position, self._bucketed(generator))
            return
        order = self._kept
        if self.order == "random":
            order = generator.permutation(order)
        elif self.order == "seqlen":
            order = self._by_length(order)
        yield from self._cut(order[position:])

    def _by_length(self, samples: np.ndarray) -> np.ndarray:
        return samples[np.argsort(self.lengths[samples], kind="stable")]

    def _bucketed(self, generator: np.random.Generator) -> Iterator[list[int]]:
        """Stretches of some dozens of micro-batches, each sorted and packed, and these mixed."""
        shuffled = generator.permutation(self._kept)
        mean = max(1.0, float(self.lengths[self._kept].mean()))
        stretch = max(1, round(_BUCKET_BATCHES * self.max_tokens / mean))
        over: list[int] = []
        for start in range(0, len(shuffled), stretch):
            samples = np.array([*over, *shuffled[start : start + stretch]])
            batches = list(self._cut(self._by_length(samples)))
            is_last = start + stretch >= len(shuffled)
            over = [] if is_last else batches.pop()  # seldom full
            mixed = generator.permutation(len(batches) - is_last).tolist()
            yield from (batches[place] for place in mixed)
            if is_last:
                yield batches[-1]

    def _long_enough(self, batches: Iterator[list[int]]) -> Iterator[list[int]]:
        """All of them but a last one that has too few samples, which no other one may have."""
        held: list[int] | None = None
        for batch in batches:
            if held is not None:
                if len(held) < self.min_samples:
                    raise DataError(
                        f"samples {held[0]} to {batch[0]} have more than max_tokens = "
                        f"{self.max_tokens} tokens, in no more than min_batch_size = "
                        f"{self.min_samples} samples; raise the one or lower the other"
                    )
                yield held
            held = batch
        if held is not None and len(held) >= self.min_samples:
            yield held

    def _cut(self, order: np.ndarray) -> Iterator[list[int]]:
        """Samples in order, cut where the next one would be too much."""
        batch: list[int] = []
        tokens = 0
        for sample in order.tolist():
            length = int(self.lengths[sample])
            if batch and (tokens + length > self.max_tokens or len(batch) == self.max_samples):
                yield batch
                batch, tokens = [], 0
            batch.append(sample)
            tokens += length
        if batch:
            yield batch

    def _split(self, step: list[list[int]]) -> bool:
        """Halve micro-batches until there are enough for a step; returns whether that worked."""
        while len(step) < self.group:
            largest = max(range(len(step)), key=lambda place: len(step[place]))
            batch = step[largest]
            half = len(batch) // 2
            if half < self.min_samples:
                return False
            step[largest : largest + 1] = [batch[:half], batch[half:]]
        return True


def _without_first(count: int, batches: Iterator[list[int]]) -> Iterator[list[int]]:
    """Batches without the first `count` samples."""
    for batch in batches:
        if count < len(batch):
            yield batch[count:]
        count = max(0, count - len(batch))


def lr_factor(samples: int, base_samples: int, scaling: LrScaling) -> float:
    """By what to multiply a learning rate that is meant for steps of `base_samples`.

    Sources: linear: Goyal et al. 2017 (1706.02677); sqrt: Krizhevsky 2014 (1404.5997).
    """
    if scaling == "linear":
        return samples / base_samples
    return math.sqrt(samples / base_samples) if scaling == "sqrt" else 1.0


class VariableBatchLR:
    """A learning-rate schedule whose rates follow the number of samples of each step.

    Args:
        optimizer: whose groups' rates are set; or an engine's `sharding`, which has them too.
        scheduler: the schedule to follow; None: constant rates.
        base_samples: samples per step that its rates are meant for.
        scaling: how a rate follows the samples.

    Before each step, call `begin(samples)`; after it, `step()`. Under an engine, the section
    `data_efficiency.data_sampling.dynamic_batching` does both.
    """

    def __init__(
        self,
        optimizer: Any,
        scheduler: Any = None,
        *,
        base_samples: int,
        scaling: LrScaling = "linear",
    ) -> None:
        self.scheduler, self.base_samples, self.scaling = scheduler, base_samples, scaling
        self.optimizer = optimizer
        self._plain = [float(group["lr"]) for group in optimizer.param_groups]

    def begin(self, samples: int) -> None:
        """Set the rates of a step of so many samples."""
        factor = lr_factor(samples, self.base_samples, self.scaling)
        self._set([rate * factor for rate in self._plain])

    def step(self) -> None:
        """Move the schedule on; the rates are its own until the next `begin`."""
        self._set(self._plain)
        if self.scheduler is not None:
            self.scheduler.step()
            self._plain = [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float]:
        """The rates of the schedule, before they are scaled."""
        return list(self._plain)

    def state_dict(self) -> dict[str, Any]:
        """The schedule's own state, and its rates."""
        inner = {} if self.scheduler is None else self.scheduler.state_dict()
        kept = {key: value for key, value in inner.items() if not callable(value)}
        return {"rates": list(self._plain), "scheduler": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved."""
        if "rates" not in state:
            raise DsError(
                "lr_scheduler: the saved state is that of a schedule without dynamic_batching; "
                "load it without the section, or with load_lr_scheduler_states=False"
            )
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self._plain = [float(rate) for rate in state["rates"]]
        self._set(self._plain)

    def _set(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def pad_collate(value: int = 0, target_value: int = -100) -> Callable[[list[Any]], Any]:
    """A collate function that pads sequences of different lengths at their ends.

    Args:
        value: for the first or only tensor of a sample, and for those of a mapping.
        target_value: for further tensors of a tuple, and for those named "labels" or "targets".

    Samples are tensors `[length]`, or tuples or mappings of them. Returns the same form with
    tensors `[batch, longest]`.
    """
    return _PadCollate(value, target_value)


class _PadCollate:
    """A class, so that it can be sent to worker processes."""

    def __init__(self, value: int, target_value: int) -> None:
        self._value, self._target_value = value, target_value

    def __call__(self, samples: list[Any]) -> Any:
        first = samples[0]
        if isinstance(first, Mapping):
            return {
                key: self._stack([sample[key] for sample in samples], key in ("labels", "targets"))
                for key in first
            }
        if isinstance(first, list | tuple):
            parts = zip(*samples, strict=True)
            return tuple(self._stack(list(part), place > 0) for place, part in enumerate(parts))
        return self._stack(samples, False)

    def _stack(self, values: list[Any], is_target: bool) -> torch.Tensor:
        tensors = [torch.as_tensor(value) for value in values]
        fill = self._target_value if is_target else self._value
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
