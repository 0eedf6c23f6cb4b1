"""What `ds trace summary` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from ds_core.cli.tables import table
from ds_core.tracing.lanes import RankTrace
from ds_core.tracing.overlap import Overlap, longest_waits, overlap_of


def render(ranks: Sequence[RankTrace]) -> str:
    """Tables of each step and rank, and of the longest waits, with their meaning below."""
    figures = [each for rank in ranks for each in overlap_of(rank)]
    figures.sort(key=lambda each: (_number(each.step), each.rank))
    header = [
        *("step", "rank", "time", "compute", "communication", "hidden", "gather", "hidden"),
        *("reduce", "hidden", "waiting", "neither"),
    ]
    parts = [table("Overlap, in milliseconds", [_row(each) for each in figures], header)]
    waits = [
        (f"rank {each.rank}", each.name, each.count, f"{each.wait_us / 1e3:.2f}")
        for each in longest_waits(ranks)
    ]
    if waits:
        parts.append(table("Longest waits", waits, ["", "waited", "times", "ms in total"]))
    parts.append(_LEGEND)
    missing = sorted(set(range(ranks[0].world_size)) - {each.rank for each in ranks})
    if missing:
        parts.append(f"Ranks that are not in this folder: {', '.join(map(str, missing))}.\n")
    return "\n".join(parts)


def as_json(ranks: Sequence[RankTrace]) -> str:
    """The same figures, in microseconds."""
    overlaps = [
        asdict(each) | {"hidden_share": each.hidden_share}
        for rank in ranks
        for each in overlap_of(rank)
    ]
    waits = [asdict(each) for each in longest_waits(ranks, number=100)]
    return json.dumps({"steps": overlaps, "waits": waits}, indent=2)


_LEGEND = (
    "communication: at least one message was under way; hidden: the part of it during which this\n"
    "rank computed. waiting: blocked until a message arrived. neither: no operation ran and no\n"
    "message was under way (Python, data, other processes). On a CPU a message that nobody waits\n"
    "for yet counts as under way until its wait, unless the backend tells when it was complete.\n"
)


def _row(each: Overlap) -> list[str]:
    times = [
        *(each.step_us, each.compute_us, each.communication_us),
        *(each.gather_us, each.reduce_us, each.wait_us, each.idle_us),
    ]
    step, compute, communication, gather, reduce, wait, idle = (f"{t / 1e3:.2f}" for t in times)
    return [
        *(each.step, str(each.rank), step, compute, communication),
        _share(each.hidden_us, each.communication_us),
        *(gather, _share(each.gather_hidden_us, each.gather_us)),
        *(reduce, _share(each.reduce_hidden_us, each.reduce_us)),
        *(f"{wait} ({_share(each.wait_us, each.step_us)})", idle),
    ]


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _number(step: str) -> int:
    digits = step.rpartition(" ")[2]
    return int(digits) if digits.isdigit() else 0
