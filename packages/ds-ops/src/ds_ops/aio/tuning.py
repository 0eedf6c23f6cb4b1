"""The search for the settings with which files are read and written fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ds_ops.aio.channel import Verb
from ds_ops.aio.measuring import Bench, Record, Setting
from ds_ops.aio.probe import engines

BLOCKS = (1 << 18, 1 << 20, 1 << 22, 1 << 23)
DEPTHS = (2, 4, 8, 16, 32)
#: Settings this near to the best are as good: noise decides between them, memory should.
_AS_GOOD = 0.03


def usable_engines() -> list[str]:
    """Names of the engines that can run here."""
    return [name for name, reason in engines().items() if reason is None]


def space(
    names: Sequence[str], blocks: Sequence[int] = BLOCKS, depths: Sequence[int] = DEPTHS
) -> list[Setting]:
    """Every setting of a sweep."""
    return [Setting(name, block, depth) for name in names for block in blocks for depth in depths]


def search(
    bench: Bench,
    settings: Sequence[Setting],
    verbs: Sequence[Verb],
    rounds: int,
    report: Callable[[str], object] = lambda line: None,
) -> list[Record]:
    """Measure all settings, then the better half of them again, and so on; the best first.

    Args:
        rounds: passes of the settings that stay to the end.
    """
    records = [Record(setting, bench.size) for setting in settings]
    left = records
    for number in range(rounds):
        report(f"round {number + 1} of {rounds}: {len(left)} settings")
        for record in left:
            bench.add(record, verbs)
        left = sorted(left, key=seconds)[: max(4, len(left) // 2)]
    passes = max(len(record.samples[verbs[0]]) for record in records)
    last = [record for record in records if len(record.samples[verbs[0]]) == passes]
    rest = [record for record in records if len(record.samples[verbs[0]]) < passes]
    return [*sorted(last, key=seconds), *sorted(rest, key=seconds)]


def seconds(record: Record) -> float:
    """What a pass in every direction takes, each at its fastest."""
    return sum(min(sample.seconds for sample in found) for found in record.samples.values())


def choose(ranked: Sequence[Record]) -> Record:
    """Of the settings that are as good as the best, the one with the least in flight."""
    limit = seconds(ranked[0]) * (1 + _AS_GOOD)
    near = [record for record in ranked if seconds(record) <= limit]
    return min(near, key=lambda record: record.setting.block_bytes * record.setting.queue_depth)


def as_section(setting: Setting) -> dict[str, Any]:
    """The `aio` section of a config that asks for a setting."""
    preferred = usable_engines()[0]
    section: dict[str, Any] = {
        "block_size": setting.block_bytes,
        "queue_depth": setting.queue_depth,
        "intra_op_parallelism": 1,
        "single_submit": False,
        "overlap_events": True,
        "use_gds": False,
    }
    if setting.engine != preferred:
        section["engine"] = setting.engine
    return {"aio": section}
