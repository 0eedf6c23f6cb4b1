"""What may be chosen: knobs of a config, the points that they span, and a point's own config."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_core import plugins
from ds_core.errors import TuningError

STAGE = "zero_optimization.stage"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
TOTAL = "train_batch_size"
PREFETCH = "zero_optimization.stage3_prefetch_bucket_size"
#: Knobs that matter only at some stages: at the others they are left out.
_ONLY_AT: Mapping[str, tuple[int, ...]] = {PREFETCH: (3,)}


@dataclass(frozen=True)
class Point:
    """One choice: values by key path, such as "zero_optimization.stage"."""

    values: tuple[tuple[str, Any], ...]

    def __getitem__(self, path: str) -> Any:
        return dict(self.values)[path]

    def get(self, path: str) -> Any:
        """The value of a knob, None if it is no knob here."""
        return dict(self.values).get(path)

    @property
    def key(self) -> str:
        """A stable name for files and tables."""
        return ", ".join(f"{_short(path)}={json.dumps(value)}" for path, value in self.values)

    def applied_to(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """The config with this choice in place of its own values."""
        data: dict[str, Any] = copy.deepcopy(dict(document))
        for path, value in self.values:
            *parents, leaf = path.split(".")
            place = data
            for name in parents:
                inner = place.get(name)
                place[name] = dict(inner) if isinstance(inner, Mapping) else {}
                place = place[name]
            place[leaf] = value
        if self.get(MICRO) is not None and self.get(ACCUMULATION) is None and TOTAL in data:
            data.pop(ACCUMULATION, None)  # it follows from the other two
        return data


def _short(path: str) -> str:
    names = {MICRO: "micro", ACCUMULATION: "accumulation", PREFETCH: "prefetch"}
    return names.get(path, path.rpartition(".")[2])


@dataclass(frozen=True)
class Space:
    """Knobs and their values.

    Attributes:
        knobs: values by key path.
    """

    knobs: Mapping[str, Sequence[Any]]

    def points(self) -> Iterator[Point]:
        """Every combination, each once, without knobs that have no effect in it."""
        seen = set()
        names = list(self.knobs)
        for values in itertools.product(*self.knobs.values()):
            chosen = dict(zip(names, values, strict=True))
            for name, stages in _ONLY_AT.items():
                if name in chosen and chosen.get(STAGE, stages[0]) not in stages:
                    del chosen[name]
            point = Point(tuple(chosen.items()))
            if point.key not in seen:
                seen.add(point.key)
                yield point


def default_space(document: Mapping[str, Any], ranks: int, micros: Sequence[int]) -> Space:
    """The knobs that are searched where the user names none.

    The ZeRO stage and prefetching, if ds-zero is installed and there is more than one rank; and
    the micro-batch, with the accumulation that keeps the global batch, if the config fixes one.
    """
    knobs: dict[str, Sequence[Any]] = {}
    if "zero_optimization" in plugins.registered("sharding") and ranks > 1:
        knobs[STAGE] = (0, 1, 2, 3)
    knobs[MICRO] = tuple(micros)
    if STAGE in knobs:
        knobs[PREFETCH] = (50_000_000, 0)
    return Space(knobs)


def micro_batches(document: Mapping[str, Any], ranks: int, *, least: int, most: int) -> list[int]:
    """Micro-batches worth trying, ascending: they divide a rank's share of the global batch.

    Powers of two up to `most`, and where the global batch is fixed, its share itself.

    Raises TuningError if none is possible.
    """
    total = document.get(TOTAL)
    sizes = [2**power for power in range(most.bit_length()) if least <= 2**power <= most]
    if isinstance(total, int):
        share, rest = divmod(total, ranks)
        sizes = [size for size in sizes if share % size == 0 and not rest]
        if least <= share <= most and share not in sizes and not rest:
            sizes.append(share)
    if not sizes:
        raise TuningError(
            f"train_batch_size: got {total}: no micro-batch from {least} to {most} divides its "
            f"share on {ranks} ranks; choose a batch that is a multiple of {ranks}"
        )
    return sizes


def parse_knob(text: str) -> tuple[str, list[Any]]:
    """A knob from the command line: "KEY=VALUE,VALUE", values as JSON or bare words.

    Raises TuningError if it is written otherwise.
    """
    path, equals, values = text.partition("=")
    if not path or not equals or not values:
        raise TuningError(
            f"--set: got {text!r}, expected KEY=VALUE,VALUE such as zero_optimization.stage=1,2"
        )
    return path, [_value(word) for word in values.split(",")]


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word
