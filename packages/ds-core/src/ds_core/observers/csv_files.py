"""Scalars as CSV files, one each, as DeepSpeed's `csv_monitor` lays them out."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import IO, Any

from ds_core.errors import DsError
from ds_core.observers.sink import Record


class CsvFiles:
    """A sink that appends to `folder/NAME.csv`, one file per scalar, flushed at each record.

    The columns are "step", which counts samples as DeepSpeed's does, and the scalar. A file that
    exists is gone on with, without a second header.

    Args:
        folder: created.

    Raises DsError if a file cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._files: dict[str, tuple[IO[str], Any]] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._problem(error) from error

    def __del__(self) -> None:
        self.close()

    def write(self, record: Record) -> None:
        for name, value in record.scalars():
            file, rows = self._files.get(name) or self._open(name)
            rows.writerow([record.samples, value])
            file.flush()

    def _open(self, name: str) -> tuple[IO[str], Any]:
        path = self._folder / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.csv"
        try:
            file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115
        except OSError as error:
            raise self._problem(error) from error
        rows = csv.writer(file)
        if file.tell() == 0:
            rows.writerow(["step", name.rpartition("/")[2]])
        self._files[name] = file, rows
        return file, rows

    def _problem(self, error: OSError) -> DsError:
        return DsError(
            f"csv_monitor: cannot write into {os.fspath(self._folder)!r}: {error}; name a folder "
            f"that can be written in csv_monitor.output_path"
        )

    def close(self) -> None:
        for file, _ in self._files.values():
            file.close()
        self._files.clear()
