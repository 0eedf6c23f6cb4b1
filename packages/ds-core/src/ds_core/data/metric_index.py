"""What was measured of each sample, on disk: values by sample, and samples by value."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ds_core.data.megatron import MegatronTokens
from ds_core.data.stored_arrays import ArrayFolder, StoredArrays
from ds_core.errors import DataError

_KIND = "ds-core metric"


class MetricIndex:
    """One metric of every sample of a dataset.

    Attributes:
        ordered_samples: sample numbers, `[num_samples]`, by ascending value, then by number. On
            disk `index_to_sample`.
        values: the values that occur, `[num_values]`, ascending. On disk `index_to_metric`.
        ends: where the samples of each value end in `ordered_samples`, `[num_values]`.
        by_sample: the value of each sample, `[num_samples]`; None in DeepSpeed's files, where it
            is a file of its own. On disk `sample_to_metric`.
    """

    def __init__(
        self,
        ordered_samples: np.ndarray,
        values: np.ndarray,
        ends: np.ndarray,
        by_sample: np.ndarray | None = None,
    ) -> None:
        self.ordered_samples, self.values, self.ends = ordered_samples, values, ends
        self.by_sample = by_sample

    def __len__(self) -> int:
        """Samples."""
        return len(self.ordered_samples)

    def num_up_to_value(self, value: float) -> int:
        """Samples whose metric is at most `value`: the first so many of `ordered_samples`."""
        position = int(np.searchsorted(self.values, value, side="right"))
        return int(self.ends[position - 1]) if position else 0

    def num_up_to_share(self, part: int, whole: int) -> int:
        """Samples of the easiest `part / whole` of all."""
        return len(self) * min(part, whole) // whole

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], metric_path: str | os.PathLike[str] | None = None
    ) -> MetricIndex:
        """The index at a place, mapped.

        Args:
            path: the folder that `analyze` wrote for the metric, a file in it, or the prefix of
                DeepSpeed's `index_to_sample` files.
            metric_path: the prefix of DeepSpeed's `index_to_metric` files; values are then known.

        Raises DataError if there is none, or if it is damaged.
        """
        place = Path(path)
        if place.with_name(f"{place.name}.idx").exists():
            return _from_deepspeed(place, None if metric_path is None else Path(metric_path))
        stored = StoredArrays(place if place.is_dir() else place.parent, _KIND)
        names = ("index_to_sample", "index_to_metric", "index_ends", "sample_to_metric")
        return cls(*(stored.array(name) for name in names))

    @staticmethod
    def verify(path: str | os.PathLike[str]) -> None:
        """Check every byte of an index. Raises DataError naming the damaged file."""
        StoredArrays(path, _KIND).verify()


def write_index(
    folder: str | os.PathLike[str], name: str, by_sample: np.ndarray, *, overwrite: bool = False
) -> Path:
    """Sort the values of all samples and write `folder/name`, atomically; returns that path.

    by_sample: `[num_samples]`, integers or floats. Raises DataError if one is not finite.
    """
    if not len(by_sample):
        raise DataError(f"metric {name!r}: there is no sample")
    if not np.isfinite(by_sample).all():
        first = int(np.flatnonzero(~np.isfinite(by_sample))[0])
        raise DataError(f"metric {name!r} of sample {first} is {by_sample[first]}, expected finite")
    order = np.argsort(by_sample, kind="stable")
    values, counts = np.unique(by_sample, return_counts=True)
    target = ArrayFolder(Path(folder) / name, _KIND, replaces=overwrite)
    try:
        target.write_array("sample_to_metric", by_sample)
        target.write_array("index_to_sample", order.astype(np.min_scalar_type(len(order))))
        target.write_array("index_to_metric", values)
        target.write_array("index_ends", np.cumsum(counts, dtype=np.int64))
        return target.publish(metric=name, num_samples=len(by_sample))
    except BaseException:
        target.discard()
        raise


def _from_deepspeed(samples: Path, metrics: Path | None) -> MetricIndex:
    """DeepSpeed's two files: rows of sample numbers, and the value that each row is of."""
    rows = MegatronTokens(samples)
    ends = np.cumsum(rows.lengths, dtype=np.int64)
    if metrics is None:
        values = np.arange(len(rows))  # ranks only: percentiles need no more
    else:
        found = MegatronTokens(metrics)
        values = np.array([found[row].item() for row in range(len(found))])
    if len(values) != len(rows) or (np.diff(values) < 0).any():
        raise DataError(
            f"{str(samples)!r} has {len(rows)} rows and {str(metrics)!r} {len(values)} values; "
            f"there must be one for each row, ascending"
        )
    return MetricIndex(rows.elements, values, ends)
