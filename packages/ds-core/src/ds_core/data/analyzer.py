"""Measures every sample of a dataset once, ahead of training, on all processes there are.

Map: each rank, and each of its worker processes, measures its own stretch of samples. Reduce: one
sorts the values and writes an index per metric, which curricula and batches by tokens read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ds_core import comm
from ds_core.data.loader import length_of
from ds_core.data.metric_index import MetricIndex, write_index
from ds_core.data.metrics import Metric
from ds_core.errors import DataError

_SAMPLES_PER_CHUNK = 256


def analyze(
    dataset: Dataset[Any],
    metrics: Mapping[str, Metric],
    folder: str | os.PathLike[str],
    *,
    num_workers: int = 0,
    group: comm.Group | None = None,
    overwrite: bool = False,
) -> dict[str, MetricIndex]:
    """Measure every sample, write `folder/NAME` for each metric, and open what was written.

    Args:
        dataset: map-style.
        metrics: functions from a sample to a finite number, by name.
        folder: is made; with a group, on storage that all its ranks share.
        num_workers: processes per rank; 0: this one.
        group: ranks that share the work; None: this process alone.
        overwrite: measure again what is there.

    Raises DataError, on all ranks, if a metric fails on a sample (which is named), is not a finite
    number, or is there already. Collective over `group`.
    """
    num_samples, target = length_of(dataset), Path(folder)
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    taken = [name for name in metrics if (target / name).exists()]
    if taken and not overwrite:
        raise DataError(f"{str(target / taken[0])!r} exists already; pass overwrite=True")
    share = range(num_samples * rank // size, num_samples * (rank + 1) // size)
    try:
        part = _measure(dataset, metrics, share, num_workers)
        problem = None
    except DataError as error:
        part, problem = {}, str(error)
    parts = [(part, problem)]
    if group is not None:
        parts = comm.all_gather_object((part, problem), group, caller="analyze")
    problems = [told for _, told in parts if told is not None]
    if not problems and rank == 0:
        try:
            for name in metrics:
                values = np.concatenate([values[name] for values, _ in parts])
                write_index(target, name, values, overwrite=overwrite)
        except (DataError, OSError) as error:
            problems = [str(error)]
    if group is not None:
        problems = comm.broadcast_object(problems, group, caller="analyze")
    if problems:
        raise DataError(problems[0])
    return {name: MetricIndex.open(target / name) for name in metrics}


def _measure(
    dataset: Dataset[Any], metrics: Mapping[str, Metric], share: range, num_workers: int
) -> dict[str, np.ndarray]:
    """The values of a stretch of samples, by metric, each `[len(share)]`."""
    chunks = DataLoader(
        _Measured(dataset, metrics), _SAMPLES_PER_CHUNK, sampler=share, num_workers=num_workers,
        collate_fn=list,
    )  # fmt: skip
    rows: list[list[Any]] = []
    for chunk in chunks:
        for row in chunk:
            if isinstance(row, str):
                raise DataError(row)
            rows.append(row)
    names = list(metrics)
    return {
        name: np.array([row[place] for row in rows], np.int64 if whole else np.float64)
        for place, name in enumerate(names)
        for whole in [all(isinstance(row[place], int) for row in rows)]
    }


class _Measured(Dataset[Any]):
    """The metrics of each sample; a failure is a text, which crosses processes unharmed."""

    def __init__(self, dataset: Dataset[Any], metrics: Mapping[str, Metric]) -> None:
        self._dataset, self._metrics = dataset, metrics

    def __getitem__(self, index: int) -> list[Any] | str:
        sample, row = self._dataset[index], []
        for name, metric in self._metrics.items():
            try:
                found = metric(sample)
                value = found.item() if hasattr(found, "item") else found
                row.append(int(value) if isinstance(value, bool | int) else float(value))
            except Exception as error:
                return f"metric {name!r} of sample {index}: {type(error).__name__}: {error}"
        return row
