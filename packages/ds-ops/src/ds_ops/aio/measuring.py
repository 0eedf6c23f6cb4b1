"""How fast files are read and written here, by setting; and by fio, where it is installed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch

from ds_core.errors import OpError
from ds_ops.aio.buffers import aligned_empty
from ds_ops.aio.channel import Verb
from ds_ops.aio.engine import AsyncIO, EngineName
from ds_ops.aio.file import AsyncFile

FioEngine = Literal["io_uring", "libaio"]


class Sample(NamedTuple):
    """One pass over a file: how long it took, and the processor's time in it, in seconds."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Setting:
    """One way to move the bytes of a file.

    Attributes:
        engine: "io_uring" or "threads"; or "fio io_uring", "fio libaio".
        block_bytes, queue_depth: as of AsyncIO; of the engine "threads", the depth is of threads.
    """

    engine: str
    block_bytes: int
    queue_depth: int

    @property
    def shown(self) -> str:
        """As "1 MiB x 32"."""
        return f"{size_text(self.block_bytes)} x {self.queue_depth}"


@dataclass
class Record:
    """What was measured of one setting."""

    setting: Setting
    size: int
    samples: dict[Verb, list[Sample]] = field(default_factory=dict)

    def gb_per_s(self, verb: Verb) -> float | None:
        """Of the fastest pass, in 10^9 bytes per second."""
        found = self.samples.get(verb)
        return self.size / min(sample.seconds for sample in found) / 1e9 if found else None

    def median_gb_per_s(self, verb: Verb) -> float | None:
        """Of the middle pass."""
        found = sorted(sample.seconds for sample in self.samples.get(verb, ()))
        return self.size / found[len(found) // 2] / 1e9 if found else None

    def cpu_s_per_gib(self, verb: Verb) -> float | None:
        """The processor's time per GiB, of the cheapest pass."""
        found = self.samples.get(verb)
        if not found:
            return None
        return min(sample.cpu_seconds for sample in found) / (self.size / 2**30)

    def as_dict(self) -> dict[str, object]:
        """All of it, for JSON."""
        told: dict[str, object] = {
            "engine": self.setting.engine,
            "block_bytes": self.setting.block_bytes,
            "queue_depth": self.setting.queue_depth,
        }
        for verb in self.samples:
            told[f"{verb}_gb_per_s"] = self.gb_per_s(verb)
            told[f"{verb}_median_gb_per_s"] = self.median_gb_per_s(verb)
            told[f"{verb}_cpu_s_per_gib"] = self.cpu_s_per_gib(verb)
        return told


def size_text(size: int) -> str:
    """As "64 KiB"."""
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


# --- The file -------------------------------------------------------------------------------------


@contextlib.contextmanager
def scratch_file(place: Path, size: int) -> Iterator[tuple[Path, bool]]:
    """A file to measure with, and whether it may be written.

    Args:
        place: a folder, in which one of `size` bytes is made and removed; or a file, which is only
            read.

    Raises OpError if there is neither.
    """
    if place.is_file():
        yield place, False
        return
    if not place.is_dir():
        raise OpError(f"{place}: neither a folder nor a file; give a folder on the disk to measure")
    handle, name = tempfile.mkstemp(prefix="ds-io-", suffix=".bin", dir=place)
    os.close(handle)
    try:
        with AsyncFile(name, "rw") as file:
            file.preallocate(size)
            data = torch.randint(256, (1 << 24,), dtype=torch.uint8)
            for offset in range(0, size, data.numel()):
                file.write(data[: size - offset], offset)
            file.fsync()
        yield Path(name), True
    finally:
        os.unlink(name)


# --- Passes ---------------------------------------------------------------------------------------


class Bench:
    """Measures settings on one file, over aligned memory that all of them share.

    Args:
        path: of the file.
        size: bytes of a pass, from the file's beginning; a multiple of every block.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._memory = aligned_empty(size)
        self._memory.fill_(1)
        self._engines: dict[Setting, AsyncIO] = {}

    def measure(
        self,
        settings: Sequence[Setting],
        verbs: Sequence[Verb],
        rounds: int,
        report: Callable[[str], object] = lambda line: None,
    ) -> list[Record]:
        """Every setting in every round, so that what disturbs the machine disturbs all."""
        records = [Record(setting, self.size) for setting in settings]
        for number in range(rounds):
            report(f"round {number + 1} of {rounds}: {len(settings)} settings")
            turn = number % len(records)
            for record in records[turn:] + records[:turn]:
                self.add(record, verbs)
        return records

    def add(self, record: Record, verbs: Sequence[Verb]) -> None:
        """One pass of a setting in each direction."""
        setting = record.setting
        if setting.engine.startswith("fio "):
            for verb in verbs:
                record.samples.setdefault(verb, []).append(self._fio(setting, verb))
            return
        for verb in verbs:
            record.samples.setdefault(verb, []).append(self._pass(self._engine(setting), verb))

    def _engine(self, setting: Setting) -> AsyncIO:
        """Of that setting, the same in every round: how long it takes to start is not measured."""
        if setting not in self._engines:
            self._engines[setting] = AsyncIO(
                cast(EngineName, setting.engine),
                queue_depth=setting.queue_depth,
                block_bytes=setting.block_bytes,
                threads=setting.queue_depth,
            )
        return self._engines[setting]

    def close(self) -> None:
        """End its engines."""
        for engine in self._engines.values():
            engine.close()

    def _pass(self, engine: AsyncIO, verb: Verb) -> Sample:
        with AsyncFile(self.path, "r" if verb == "read" else "rw", engine=engine) as file:
            cpu, begin = cpu_seconds(), time.perf_counter()
            if verb == "read":
                file.read_sync(self._memory)
            else:
                file.write_sync(self._memory)
            return Sample(time.perf_counter() - begin, cpu_seconds() - cpu)

    def _fio(self, setting: Setting, verb: Verb) -> Sample:
        engine = setting.engine.removeprefix("fio ")
        command = [
            *("fio", "--name=ds", "--thread", "--direct=1", "--output-format=json"),
            *(f"--filename={self.path}", f"--rw={verb}", f"--size={self.size}"),
            *(f"--bs={setting.block_bytes}", f"--iodepth={setting.queue_depth}"),
            *(f"--ioengine={engine}", "--fallocate=none"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OpError(f"fio failed ({' '.join(command)}): {done.stderr.strip()[:500]}")
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        # Its own figure: of the transfers, without its start.
        seconds = self.size / job[verb]["bw_bytes"]
        return Sample(seconds, (job["usr_cpu"] + job["sys_cpu"]) / 100 * job[verb]["runtime"] / 1e3)


def cpu_seconds() -> float:
    """The processor time that this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def fio_engines() -> list[FioEngine]:
    """The engines of an installed fio that compare with ours; none without fio."""
    if shutil.which("fio") is None:
        return []
    told = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False).stdout
    engines: tuple[FioEngine, ...] = ("io_uring", "libaio")
    return [engine for engine in engines if engine in told.split()]
