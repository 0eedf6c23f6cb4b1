"""Reading and writing files around the page cache, beside fio and DeepSpeed's async I/O.

    python -m ds_ops.bench.aio --seconds 10

The floor is the faster of fio's io_uring and libaio on the same file, with the same block and
depth, by fio's own figure. The peer is DeepSpeed's aio_handle, where deepspeed and libaio are
installed (its op is built at first use). All candidates take turns within a row. One more row
compares torch.save into a FastFileWriter with torch.save into an ordinary file.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ds_ops.aio import FastFileWriter
from ds_ops.aio.channel import Verb
from ds_ops.aio.measuring import Bench, Record, Sample, Setting, fio_engines, scratch_file
from ds_ops.aio.measuring import cpu_seconds as cpu_now
from ds_ops.aio.tuning import usable_engines
from ds_ops.bench import timing

SIZE = 256 << 20
SHAPES = ((1 << 20, 32), (4 << 20, 16), (8 << 20, 8))
#: Blocks that the target is for, as x floor and x peer: 0.95 of fio, 1.0 of DeepSpeed.
_MAX_X_FLOOR, _MIN_X_PEER = 1 / 0.95, 1.0

Pass = Callable[[Verb], Sample]


def rows(seconds: float) -> Iterator[timing.Row]:
    """Every engine, block and direction, then torch.save; `seconds` per row, 5 rounds at least."""
    with scratch_file(Path.cwd(), SIZE) as (path, _), contextlib.closing(Bench(path, SIZE)) as ours:
        for block, depth in SHAPES:
            yield from _shape_rows(ours, block, depth, seconds)
    yield from _save_rows(seconds)


def _shape_rows(bench: Bench, block: int, depth: int, seconds: float) -> Iterator[timing.Row]:
    names = usable_engines()
    settings = [Setting(name, block, depth) for name in names]
    floors = [Setting(f"fio {name}", block, depth) for name in fio_engines()]
    records = [Record(setting, bench.size) for setting in (*settings, *floors)]
    peer = deepspeed_pass(bench.path, bench.size, block, depth)
    theirs = Record(Setting("deepspeed aio", block, depth), bench.size)
    verbs: list[Verb] = ["read", "write"]
    deadline = time.perf_counter() + seconds * len(names) * len(verbs)
    rounds = 0
    while rounds < 5 or time.perf_counter() < deadline:
        for record in records:
            bench.add(record, verbs)
        if peer is not None:
            for verb in verbs:
                theirs.samples.setdefault(verb, []).append(peer(verb))
        records.append(records.pop(0))
        rounds += 1
    by_setting = {record.setting: record for record in records}
    for verb in verbs:
        floor = min((_ms(by_setting[each], verb) for each in floors), default=None)
        for setting in settings:
            yield _row(by_setting[setting], verb, floor, theirs)


def _row(record: Record, verb: Verb, floor_ms: float | None, theirs: Record) -> timing.Row:
    peer_ms = _ms(theirs, verb) if theirs.samples else None
    note = f"{record.gb_per_s(verb):.2f} GB/s, {record.cpu_s_per_gib(verb):.3f} CPU s/GiB"
    if theirs.samples:
        note += f" (deepspeed {theirs.cpu_s_per_gib(verb):.3f})"
    return timing.Row(
        f"{verb} {record.setting.engine}",
        f"{record.size >> 20} MiB by {record.setting.shown}",
        "bytes",
        _ms(record, verb),
        floor_ms=floor_ms,
        peer="deepspeed aio" if theirs.samples else "",
        peer_ms=peer_ms,
        max_x_floor=_MAX_X_FLOOR,
        min_x_peer=_MIN_X_PEER,
        note=note,
    )


def _ms(record: Record, verb: Verb) -> float:
    return min(sample.seconds for sample in record.samples[verb]) * 1e3


def deepspeed_pass(path: Path, size: int, block: int, depth: int) -> Pass | None:
    """One pass of DeepSpeed's handle over the file, from its own kind of memory; None without it.

    With the keys' defaults, and with overlap_events and not single_submit, its fastest.
    """
    module = _deepspeed()
    if module is None:
        return None
    handle = module.aio_handle(block, depth, False, True, 1)
    memory = handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))

    def run(verb: Verb) -> Sample:
        cpu, begin = cpu_now(), time.perf_counter()
        call = handle.sync_pread if verb == "read" else handle.sync_pwrite
        call(memory, str(path), 0)
        return Sample(time.perf_counter() - begin, cpu_now() - cpu)

    return run


@cache
def _deepspeed() -> Any:
    try:
        builders = importlib.import_module("deepspeed.ops.op_builder")
    except ImportError:
        return None
    builder = builders.AsyncIOBuilder()
    return builder.load(verbose=False) if builder.is_compatible() else None


# --- torch.save -----------------------------------------------------------------------------------


class _Nowhere:
    """A file that drops what is written: what torch.save itself takes."""

    def write(self, data: memoryview) -> int:
        return len(data)

    def flush(self) -> None: ...


def _save_rows(seconds: float) -> Iterator[timing.Row]:
    state = {f"layer{i}": torch.randn(1 << 24) for i in range(8)}  # 512 MiB
    before = torch.serialization.get_crc32_options()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="ds-io-") as folder:
        try:
            for crc, synced in ((True, False), (False, False), (False, True)):
                torch.serialization.set_crc32_options(crc)
                yield _save_row(state, folder, seconds, crc, synced)
        finally:
            torch.serialization.set_crc32_options(before)


def _save_row(
    state: dict[str, torch.Tensor], folder: str, seconds: float, crc: bool, synced: bool
) -> timing.Row:
    size = sum(t.nbytes for t in state.values())
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: _save_fast(state, folder, synced),
        "open()": lambda: _save_plain(state, folder, synced),
    }
    if crc:  # without it, torch.save itself takes no time
        nowhere: Any = _Nowhere()
        calls["floor"] = lambda: torch.save(state, nowhere)
    found = timing.interleave(calls, seconds=max(seconds, 5.0), min_rounds=3)
    return timing.row(
        "torch.save" + (" + fsync" if synced else ""),
        f"{size >> 20} MiB" + ("" if crc else " without CRC"),
        "fp32",
        found,
        peer="open()",
        error=0.0 if _same(state, f"{folder}/fast.pt") else 1.0,
        min_x_peer=1.0,
        note=f"{size / found['ours'].min_s / 1e9:.2f} GB/s",
    )


def _save_fast(state: dict[str, torch.Tensor], folder: str, synced: bool) -> None:
    with FastFileWriter(f"{folder}/fast.pt", fsync=synced) as file:
        torch.save(state, file)


def _save_plain(state: dict[str, torch.Tensor], folder: str, synced: bool) -> None:
    with open(f"{folder}/plain.pt", "wb") as file:
        torch.save(state, file)
        if synced:
            file.flush()
            os.fsync(file.fileno())


def _same(state: dict[str, torch.Tensor], path: str) -> bool:
    found = torch.load(path, mmap=True)
    return all(torch.equal(found[name], t) for name, t in state.items())


if __name__ == "__main__":
    timing.main(rows)
