"""One global batch for many cluster sizes, so that a job may shrink and grow without retraining.

The batch is a micro-batch (or the least common multiple of all of them) times a highly composite
number: such a product divides evenly over more numbers of ranks than any of its neighbours.

    >>> choice = choose_batch(max_train_batch_size=2000, micro_batch_sizes=(2, 4, 6))
    >>> choice.train_batch_size, len(choice.gpu_counts)
    (1680, 32)

No tensor and no process group: integers only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from ds_core.config.batch import Batch
from ds_core.config.section import Only, Section, refusal
from ds_core.errors import ConfigError

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)


@dataclass(frozen=True)
class ElasticBatch:
    """A global batch and the clusters that can train with it.

    Attributes:
        train_batch_size: samples per optimizer step over all ranks, whatever the cluster.
        micro_batch_sizes: samples per forward on one rank that may be used, ascending.
        data_ranks: numbers of data-parallel ranks among which it divides evenly, ascending.
        model_parallel_size: GPUs that hold one copy of the model together.
    """

    train_batch_size: int
    micro_batch_sizes: tuple[int, ...]
    data_ranks: tuple[int, ...]
    model_parallel_size: int = 1

    @property
    def gpu_counts(self) -> tuple[int, ...]:
        """GPUs of the clusters that `data_ranks` stand for."""
        return tuple(ranks * self.model_parallel_size for ranks in self.data_ranks)

    def solve(self, data_ranks: int) -> Batch:
        """The batch triangle for so many data-parallel ranks, with the largest micro-batch.

        Raises ConfigError, naming the nearest numbers that work, for one that does not.
        """
        if data_ranks not in self.data_ranks:
            raise ConfigError(
                f"elasticity: a batch of {self.train_batch_size} does not divide among "
                f"{data_ranks} data-parallel ranks; use {self._nearby(data_ranks)}"
            )
        share = self.train_batch_size // data_ranks
        micro = max(size for size in self.micro_batch_sizes if share % size == 0)
        return Batch(self.train_batch_size, micro, share // micro)

    def _nearby(self, data_ranks: int) -> str:
        below = [ranks for ranks in self.data_ranks if ranks < data_ranks][-1:]
        above = [ranks for ranks in self.data_ranks if ranks > data_ranks][:1]
        return " or ".join(map(str, below + above))


def choose_batch(
    *,
    max_train_batch_size: int,
    micro_batch_sizes: Sequence[int],
    min_gpus: int = 1,
    max_gpus: int = 10_000,
    prefer_larger_batch: bool = True,
    num_gpus_per_node: int = 1,
    model_parallel_size: int = 1,
) -> ElasticBatch:
    """The batch, no larger than asked for, that suits the most cluster sizes.

    With `num_gpus_per_node` above 1, clusters consist of whole nodes.

    Args:
        max_train_batch_size: samples per optimizer step, at most.
        micro_batch_sizes: samples per forward on one rank that the GPUs can hold.
        min_gpus: smallest cluster that counts.
        max_gpus: largest cluster that counts.
        prefer_larger_batch: which of two batches that suit equally many clusters is taken.
        num_gpus_per_node: GPUs that join and leave together.
        model_parallel_size: GPUs that hold one copy of the model; divides `num_gpus_per_node`.

    Raises ConfigError if no batch suits any cluster, or the arguments contradict each other.
    """
    micros = tuple(sorted(set(micro_batch_sizes)))
    _check(max_train_batch_size, micros, min_gpus, max_gpus, num_gpus_per_node, model_parallel_size)
    ranks_per_node = num_gpus_per_node // model_parallel_size
    most = max_train_batch_size // ranks_per_node
    if micros[-1] > most:
        raise ConfigError(
            f"elasticity.micro_batch_sizes: got {micros[-1]}, but one micro-batch on each of a "
            f"node's {ranks_per_node} data-parallel ranks is then more than max_train_batch_size "
            f"{max_train_batch_size}; use at most {most}"
        )
    nodes = range(-(-min_gpus // num_gpus_per_node), max_gpus // num_gpus_per_node + 1)
    candidates = sorted({_scaled(base, most) for base in (*micros, math.lcm(*micros))} - {0})
    valid = {batch: _divisions(batch, micros, nodes) for batch in candidates}
    order = sorted(candidates, reverse=prefer_larger_batch)
    best = max(order, key=lambda batch: len(valid[batch]))
    if not valid[best]:
        raise ConfigError(
            f"elasticity: no batch of at most {max_train_batch_size} samples divides among "
            f"{min_gpus} to {max_gpus} GPUs in nodes of {num_gpus_per_node}; raise "
            f"max_train_batch_size or widen min_gpus and max_gpus"
        )
    return ElasticBatch(
        train_batch_size=best * ranks_per_node,
        micro_batch_sizes=micros,
        data_ranks=tuple(count * ranks_per_node for count in valid[best]),
        model_parallel_size=model_parallel_size,
    )


def _check(
    most: int, micros: tuple[int, ...], min_gpus: int, max_gpus: int, per_node: int, parallel: int
) -> None:
    for name, value in (
        ("max_train_batch_size", most),
        ("micro_batch_sizes", micros[0] if micros else 0),
        ("min_gpus", min_gpus),
        ("num_gpus_per_node", per_node),
        ("model_parallel_size", parallel),
    ):
        if value < 1:
            raise ConfigError(f"elasticity.{name}: got {value}, expected at least 1")
    if max_gpus < min_gpus:
        raise ConfigError(
            f"elasticity.max_gpus: got {max_gpus}, which is less than min_gpus {min_gpus}"
        )
    if per_node % parallel:
        raise ConfigError(
            f"elasticity.model_parallel_size: got {parallel}, which does not divide "
            f"num_gpus_per_node {per_node}: one copy of the model must not reach over nodes"
        )


def _scaled(base: int, most: int) -> int:
    """The largest highly composite multiple of `base` that is at most `most`; 0 if none is."""
    return base * highly_composite(most // base)[-1] if base <= most else 0


def _divisions(batch: int, micros: tuple[int, ...], counts: range) -> list[int]:
    """The numbers of equal shares, each a multiple of some micro-batch, that lie in `counts`."""
    shares = {d for micro in micros if batch % micro == 0 for d in _divisors(batch // micro)}
    return sorted(share for share in shares if share in counts)


def _divisors(number: int) -> Iterator[int]:
    for low in range(1, math.isqrt(number) + 1):
        if number % low == 0:
            yield low
            yield number // low


def highly_composite(most: int) -> list[int]:
    """Numbers up to `most` with more divisors than any smaller one, ascending.

    Source: Ramanujan 1915, "Highly composite numbers": their prime exponents do not increase.
    """
    found = [(1, 1)]  # (number, divisors)
    pending = [(1, 1, 0, 64)]  # (number, divisors, index of the next prime, exponent at most)
    while pending:
        number, divisors, index, limit = pending.pop()
        for exponent in range(1, limit + 1):
            if index == len(_PRIMES):
                break
            number *= _PRIMES[index]
            if number > most:
                break
            found.append((number, divisors * (exponent + 1)))
            pending.append((number, divisors * (exponent + 1), index + 1, exponent))
    records, best = [], 0
    for number, divisors in sorted(found):
        if divisors > best and number <= most:
            records.append(number)
            best = divisors
    return records


class ElasticitySection(Section):
    """One global batch for many cluster sizes; it replaces the batch keys of the file."""

    enabled: bool = Field(
        default=False,
        description="Whether the batch is chosen so that it suits the most cluster sizes.",
    )
    max_train_batch_size: int = Field(
        default=2000,
        gt=0,
        description="The chosen batch is at most this. Must be given if enabled.",
        json_schema_extra={"unit": "samples"},
    )
    micro_batch_sizes: tuple[int, ...] = Field(
        default=(2, 4, 6),
        min_length=1,
        description="Micro-batches that the devices can hold; the largest that divides is used. "
        "Must be given if enabled.",
        json_schema_extra={"unit": "samples"},
    )
    min_gpus: int = Field(
        default=1,
        gt=0,
        description="Smallest cluster that counts.",
        json_schema_extra={"unit": "ranks"},
    )
    max_gpus: int = Field(
        default=10_000,
        gt=0,
        description="Largest cluster that counts.",
        json_schema_extra={"unit": "ranks"},
    )
    min_time: int = Field(
        default=0,
        ge=0,
        description="Makes no difference: a hint to a cluster's scheduler, which reads it itself.",
        json_schema_extra={"unit": "minutes"},
    )
    prefer_larger_batch: bool = Field(
        default=True,
        description="Which of two batches that suit equally many clusters is taken.",
    )
    ignore_non_elastic_batch_info: bool = Field(
        default=False,
        description="Whether batch keys that are given too are ignored; else they are an error.",
    )
    version: Annotated[
        float, Only(0.1, 0.2, because="these are the two ways to count clusters")
    ] = Field(
        default=0.2,
        description="0.1 counts single GPUs; 0.2 counts whole nodes of num_gpus_per_node.",
    )
    num_gpus_per_node: int = Field(
        default=1,
        gt=0,
        description="GPUs that join and leave together (version 0.2).",
        json_schema_extra={"unit": "ranks"},
    )
    model_parallel_size: int = Field(
        default=1,
        gt=0,
        description="GPUs that hold one copy of the model together (version 0.2).",
        json_schema_extra={"unit": "ranks"},
    )

    @model_validator(mode="after")
    def _check_combination(self) -> ElasticitySection:
        if not self.enabled:
            return self
        missing = {"max_train_batch_size", "micro_batch_sizes"} - self.model_fields_set
        if missing:
            raise refusal(f"enabled, so {' and '.join(sorted(missing))} must be given too")
        if self.version == 0.1 and self.model_parallel_size > 1:
            raise refusal(
                f"model_parallel_size {self.model_parallel_size} needs version 0.2; version 0.1 "
                f"counts single GPUs"
            )
        try:
            self.choice()
        except ConfigError as error:
            raise refusal(str(error).removeprefix("elasticity").lstrip(".: ")) from None
        return self

    def choice(self) -> ElasticBatch:
        """The batch that the section asks for, and the clusters that it suits."""
        in_nodes = self.version == 0.2
        return choose_batch(
            max_train_batch_size=self.max_train_batch_size,
            micro_batch_sizes=self.micro_batch_sizes,
            min_gpus=self.min_gpus,
            max_gpus=self.max_gpus,
            prefer_larger_batch=self.prefer_larger_batch,
            num_gpus_per_node=self.num_gpus_per_node if in_nodes else 1,
            model_parallel_size=self.model_parallel_size if in_nodes else 1,
        )

    def solve_batch(self, world_size: int) -> Batch | None:
        """The batch for so many data-parallel ranks; None if the section is not enabled.

        A `ds_core.config.batch.BatchPolicy`.
        """
        return self.choice().solve(world_size) if self.enabled else None

    def triangle(self, num_gpus: int) -> dict[str, int]:
        """The three batch keys for so many GPUs, model-parallel ones included.

        Raises ConfigError for a number that does not suit the batch.
        """
        choice = self.choice()
        if num_gpus not in choice.gpu_counts:
            nearest = sorted(choice.gpu_counts, key=lambda count: abs(count - num_gpus))[:2]
            raise ConfigError(
                f"elasticity: a batch of {choice.train_batch_size} does not suit {num_gpus} GPUs; "
                f"use {' or '.join(map(str, sorted(nearest)))}"
            )
        solved = choice.solve(num_gpus // choice.model_parallel_size)
        return {
            "world_size": num_gpus,
            "train_micro_batch_size_per_gpu": solved.micro,
            "gradient_accumulation_steps": solved.steps,
        }

    @property
    def overrules(self) -> bool:
        """Whether batch keys of the file are ignored, rather than an error beside this section."""
        return self.ignore_non_elastic_batch_info
