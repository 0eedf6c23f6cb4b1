"""Batches of samples that are easy enough by now: which, as a function of the step.

Samples that become ready together form a cluster. Each batch draws from the clusters in proportion
to their sizes, and from each without repetition until it has been through it.

Source: Li et al. 2022, "DeepSpeed Data Efficiency" (2212.03597), section 3.1.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ds_core.data.metric_index import MetricIndex
from ds_core.data.plan import PlannedBatch, PlanState, needs_keys
from ds_core.data.schedule import Schedule
from ds_core.errors import DataError

logger = logging.getLogger(__name__)

#: How many of each metric's easiest samples are ready, in the order of the plan's metrics.
_Counts = tuple[int, ...]


@dataclass(frozen=True)
class DifficultyMetric:
    """One metric by which samples wait.

    Attributes:
        schedule: the largest difficulty at each step, from 1 on.
        index: the metric of every sample; None: no sample waits for it.
        percent_of: None: a difficulty is a value of the metric; n: difficulty d means the easiest
            d / n of the samples.
    """

    schedule: Schedule
    index: MetricIndex | None = None
    percent_of: int | None = None

    def num_ready(self, difficulty: int) -> int:
        """How many of the easiest samples a difficulty admits."""
        assert self.index is not None
        if self.percent_of is not None:
            return self.index.num_up_to_share(difficulty, self.percent_of)
        return self.index.num_up_to_value(difficulty)


class CurriculumPlan:
    """Draws the batch of each optimizer step, alike on all ranks, and cuts it into micro-batches.

    Args:
        num_samples: of the dataset, and of every metric's index.
        metrics: by name; a sample waits until all of them admit it. A difficulty never falls.
        micro_batch_size: samples per batch and rank.
        accumulation: micro-batches per optimizer step and rank.
        rank, num_ranks: of the data-parallel group.
        seed: equal on all ranks.

    The state tells how far each cluster has been used at the beginning of the step, and how many
    samples of the step are done. It means the same under any number of ranks.

    Raises DataError if an index is of another number of samples.
    """

    def __init__(
        self,
        num_samples: int,
        metrics: Mapping[str, DifficultyMetric],
        micro_batch_size: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
    ) -> None:
        self.num_samples, self.metrics = num_samples, dict(metrics)
        self.rank, self.num_ranks, self.seed = rank, num_ranks, seed
        self.accumulation, self._per_micro_step = accumulation, micro_batch_size * num_ranks
        self.step_samples = self._per_micro_step * accumulation
        self._waited_for = [name for name, metric in metrics.items() if metric.index is not None]
        for name in self._waited_for:
            measured = len(self._index(name))
            if measured != num_samples:
                raise DataError(
                    f"metric {name!r} was measured of {measured} samples, and the dataset has "
                    f"{num_samples}: analyze this dataset"
                )
        self._members = functools.cache(self._find_members)
        self._pass = functools.lru_cache(maxsize=64)(self._shuffled)

    def __len__(self) -> int:
        return -(-self.num_samples // self.step_samples) * self.accumulation

    def start(self) -> PlanState:
        return {
            "samples_seen": 0, "num_samples": self.num_samples, "seed": self.seed,
            "step": 0, "step_done": 0, "step_samples": self.step_samples,
            "difficulties": {}, "clusters": [],
        }  # fmt: skip

    def adopt(self, state: PlanState) -> PlanState:
        needs_keys(state, self.start())
        if state["num_samples"] != self.num_samples:
            raise DataError(
                f"the dataset had {state['num_samples']} samples when this was saved and has "
                f"{self.num_samples}; its clusters cannot go on"
            )
        if state["step_done"] and state["step_samples"] != self.step_samples:
            logger.warning("the batch size has changed in the middle of a step, which begins anew")
            state = {**state, "step_done": 0}
        return {**state, "step_samples": self.step_samples}

    def epoch(self, state: PlanState) -> Iterator[PlannedBatch]:
        epoch = state["samples_seen"] // self.num_samples
        while state["samples_seen"] // self.num_samples == epoch:
            samples, following = self._draw(state)
            for done in range(state["step_done"], self.step_samples, self._per_micro_step):
                whole = samples[done : done + self._per_micro_step]
                is_last = done + self._per_micro_step == self.step_samples
                after = {
                    **state, "step_done": done + self._per_micro_step,
                    "difficulties": following["difficulties"],
                }  # fmt: skip
                state = following if is_last else after
                indices = whole[self.rank :: self.num_ranks]
                yield PlannedBatch(indices, state, self.step_samples)

    def _draw(self, state: PlanState) -> tuple[list[int], PlanState]:
        """The samples of the step that `state` is in, and the state after it."""
        step, seed = state["step"], state["seed"]
        before = state["difficulties"]
        difficulties = {
            name: max(int(metric.schedule(step + 1)), before.get(name, 0))
            for name, metric in self.metrics.items()
        }
        clusters = self._grown(state["clusters"], difficulties)
        sizes = np.array([cluster["size"] for cluster in clusters])
        generator = np.random.default_rng([seed, 0, step])
        shares = generator.multinomial(self.step_samples, sizes / sizes.sum())
        drawn: list[int] = []
        for number, share in enumerate(shares):
            taken, clusters[number] = self._take(clusters, number, int(share), seed)
            drawn += taken
        samples: list[int] = generator.permutation(drawn).tolist()
        following = {
            **state, "samples_seen": state["samples_seen"] + self.step_samples,
            "step": step + 1, "step_done": 0, "difficulties": difficulties, "clusters": clusters,
        }  # fmt: skip
        return samples, following

    def _grown(
        self, clusters: Sequence[dict[str, Any]], difficulties: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        """The clusters, with one more if difficulties admit more samples than they hold."""
        ready = {
            name: self.metrics[name].num_ready(difficulties[name]) for name in self._waited_for
        }
        counts = tuple(ready.values())
        known = tuple(clusters[-1]["ready"]) if clusters else None
        grown = list(clusters)
        if counts != known:
            size = len(self._members(known, counts))
            if size:
                grown.append({"ready": list(counts), "size": size, "pass": 0, "used": 0})
        if not grown:
            raise DataError(
                f"curriculum: no sample is as easy as the first difficulties, "
                f"{dict(difficulties)}; raise min_difficulty"
            )
        return grown

    def _take(
        self, clusters: Sequence[dict[str, Any]], number: int, count: int, seed: int
    ) -> tuple[list[int], dict[str, Any]]:
        """The next samples of a cluster, and the cluster after that."""
        cluster = clusters[number]
        known = tuple(clusters[number - 1]["ready"]) if number else None
        taken: list[int] = []
        turn, used = cluster["pass"], cluster["used"]
        while count:
            order = self._pass(known, tuple(cluster["ready"]), number, turn, seed)
            found = order[used : used + count].tolist()
            taken += found
            count -= len(found)
            used += len(found)
            if used == cluster["size"]:
                turn, used = turn + 1, 0
        return taken, {**cluster, "pass": turn, "used": used}

    def _shuffled(
        self, known: _Counts | None, counts: _Counts, number: int, turn: int, seed: int
    ) -> np.ndarray:
        generator = np.random.default_rng([seed, 1 + number, turn])
        return generator.permutation(self._members(known, counts))

    def _find_members(self, known: _Counts | None, counts: _Counts) -> np.ndarray:
        """Samples that `counts` admit and `known` did not, ascending."""
        now = self._admitted(counts)
        if known is not None:
            now &= ~self._admitted(known)
        return np.flatnonzero(now).astype(np.min_scalar_type(self.num_samples))

    def _admitted(self, counts: _Counts) -> np.ndarray:
        admitted = np.ones(self.num_samples, bool)
        for name, count in zip(self._waited_for, counts, strict=True):
            easy = np.zeros(self.num_samples, bool)
            easy[self._index(name).ordered_samples[:count]] = True
            admitted &= easy
        return admitted

    def _index(self, name: str) -> MetricIndex:
        index = self.metrics[name].index
        assert index is not None
        return index
