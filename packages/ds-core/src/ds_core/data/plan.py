"""Which samples a rank takes next, as a function of a small state that a checkpoint can hold."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ds_core.errors import DsError

logger = logging.getLogger(__name__)

#: JSON-able values that say how far a run has come in its data.
PlanState = dict[str, Any]


@dataclass(frozen=True)
class PlannedBatch:
    """One micro-batch of this rank.

    Attributes:
        indices: of its samples in the dataset.
        after: the state to go on from once it has been used.
        step_samples: samples of the whole optimizer step over all ranks, if the plan fixes it.
    """

    indices: list[int]
    after: PlanState
    step_samples: int | None = None


class BatchPlan(Protocol):
    """Decides the micro-batches of one rank; all ranks' plans agree without communication."""

    def epoch(self, state: PlanState) -> Iterator[PlannedBatch]:
        """The rest of the epoch that `state` is in."""

    def __len__(self) -> int:
        """Micro-batches of a whole epoch."""

    def start(self) -> PlanState:
        """The state before the first sample."""

    def adopt(self, state: PlanState) -> PlanState:
        """A saved state, perhaps of another world or batch size, as one of this plan.

        Raises DsError if it is that of another kind of plan.
        """


class ShuffledPlan:
    """Every sample once per epoch over all ranks, in an order that the epoch's number decides.

    The state counts samples that all ranks together have passed, so that it means the same under
    any number of ranks and any batch size: the next sample is the next sample.

    Args:
        num_samples: of the dataset.
        micro_batch_size: samples per batch and rank.
        rank, num_ranks: of the data-parallel group.
        drop_last: leave out an uneven last batch of an epoch.
        seed: of the orders; equal on all ranks.
        shuffles: false keeps the dataset's own order.
    """

    def __init__(
        self,
        num_samples: int,
        micro_batch_size: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        drop_last: bool = False,
        seed: int = 0,
        shuffles: bool = True,
    ) -> None:
        self.num_samples, self.micro_batch_size = num_samples, micro_batch_size
        self.rank, self.num_ranks = rank, num_ranks
        self.drop_last, self.seed, self.shuffles = drop_last, seed, shuffles
        if drop_last and len(self) == 0:
            raise DsError(
                f"training_data: {num_samples} samples are less than one micro-batch of "
                f"{micro_batch_size} on each of {num_ranks} ranks; lower the batch size"
            )

    @property
    def global_batch(self) -> int:
        """Samples that all ranks together take at a time."""
        return self.micro_batch_size * self.num_ranks

    def __len__(self) -> int:
        if self.drop_last:
            # Every rank gets as many samples as the first; what is over is dropped.
            return -(-self.num_samples // self.num_ranks) // self.micro_batch_size
        return -(-self.num_samples // self.global_batch)

    def start(self) -> PlanState:
        return {"samples_seen": 0, "num_samples": self.num_samples, "seed": self.seed}

    def adopt(self, state: PlanState) -> PlanState:
        needs_keys(state, self.start())
        seen = int(state["samples_seen"])
        if state["num_samples"] != self.num_samples:
            epoch = -(-seen // int(state["num_samples"]))
            logger.warning(
                "the dataset had %d samples when this was saved and has %d: epoch %d begins anew",
                state["num_samples"], self.num_samples, epoch,
            )  # fmt: skip
            seen = epoch * self.num_samples
        # The seed it was saved with, or the rest of the epoch would not be the rest.
        return {"samples_seen": seen, "num_samples": self.num_samples, "seed": state["seed"]}

    def epoch(self, state: PlanState) -> Iterator[PlannedBatch]:
        epoch, position = divmod(state["samples_seen"], self.num_samples)
        rest = self._rest(epoch, position, state["seed"])
        if self.drop_last and len(rest) < self.global_batch:
            # Saved with smaller batches: what is left of that epoch is less than one of these.
            epoch, position = epoch + 1, 0
            rest = self._rest(epoch, 0, state["seed"])
        end = len(rest)
        if self.drop_last:
            end -= end % self.global_batch
        for start in range(0, end, self.global_batch):
            whole = rest[start : start + self.global_batch]
            is_last = start + len(whole) >= end
            seen = self.num_samples if is_last else position + start + len(whole)
            yield PlannedBatch(
                whole[self.rank :: self.num_ranks],
                {**state, "samples_seen": epoch * self.num_samples + seen},
            )

    def _rest(self, epoch: int, position: int, seed: int) -> list[int]:
        """What all ranks take from `position` on, as many samples for each of them.

        Otherwise ranks would run out of step: the first few of the epoch are repeated at the end.
        """
        order = self._order(epoch, seed)
        rest, first = order[position:], itertools.cycle(order)
        while len(rest) % self.num_ranks:
            rest.append(next(first))
        return rest

    def _order(self, epoch: int, seed: int) -> list[int]:
        if not self.shuffles:
            return list(range(self.num_samples))
        generator = torch.Generator().manual_seed(seed + epoch)
        order: list[int] = torch.randperm(self.num_samples, generator=generator).tolist()
        return order


def needs_keys(state: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Raise DsError unless `state` has the keys of `like`."""
    if missing := sorted(like.keys() - state.keys()):
        raise DsError(
            f"data loader: the saved state lacks {', '.join(missing)} (it has "
            f"{', '.join(sorted(state)) or 'nothing'}): it is that of another kind of loader; "
            f"load it with the data sections that it was saved with"
        )
