"""One step of every rank as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_core.errors import DsError
from ds_core.tracing.intervals import Interval, intersection
from ds_core.tracing.lanes import COMMUNICATION, RankTrace
from ds_core.tracing.overlap import Overlap, computing, covered, overlap_of, steps_of

_COLORS: Mapping[str, str] = {
    "compute": "#4477aa",
    "gather": "#228833",
    "reduce": "#aa7722",
    "other": "#66ccee",
    "wait": "#ee6677",
}
_LABELS: Mapping[str, str] = {
    "compute": "compute",
    "gather": "gather",
    "reduce": "reduce",
    "other": "other messages",
    "wait": "waiting",
}
_PHASE_COLORS: Mapping[str, str] = {
    "data": "#eeeeee",
    "forward": "#d8e2ee",
    "backward": "#c4d0de",
    "norm": "#e6dfcc",
    "update": "#dccfe0",
}
#: Parts of the picture's width: gaps below the first are closed, names below the second left out.
_GAP, _NAMED = 1 / 4000, 1 / 18
#: Width of a letter of a message's name.
_LETTER = 1 / 180
#: More would not be readable.
MAX_RANKS = 32


def draw(ranks: Sequence[RankTrace], path: Path, *, step: int | None = None) -> None:
    """Write a picture of one recorded step, with the lanes of every rank below one another.

    Args:
        ranks: of one recording; the first 32 are drawn.
        path: its ending says the format.
        step: 1 for the first that was recorded; None: the last.

    Raises DsError without matplotlib, for a step that was not recorded, or a path that cannot be
    written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise DsError(
            f"ds trace plot: matplotlib cannot be imported ({error}); pip install 'ds-core[plot]'"
        ) from error
    ranks = ranks[:MAX_RANKS]
    position = _position(ranks, step)
    windows = [steps_of(rank)[position] for rank in ranks]
    begin = min(window.begin_us for window in windows)
    end = max(window.end_us for window in windows)
    figures = [overlap_of(rank)[position] for rank in ranks]
    lanes = [lane for lane in _COLORS if any(_times(rank, lane, begin, end) for rank in ranks)]
    height = 1.3 + len(ranks) * (0.55 + 0.24 * (len(lanes) + 1))
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(ranks), 1, sharex=True, squeeze=False)[:, 0]
    for each, rank, overlap in zip(axes, ranks, figures, strict=True):
        _draw_rank(each, rank, overlap, lanes, begin, end)
    axes[-1].set_xlabel("milliseconds")
    figure.suptitle(f"{windows[0].name}: {len(ranks)} of {ranks[0].world_size} ranks", fontsize=11)
    figure.legend(
        handles=[Patch(color=color, label=name) for name, color in _PHASE_COLORS.items()],
        title="phases",
        fontsize=8,
        title_fontsize=8,
        loc="outside right upper",
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise DsError(f"ds trace plot: cannot write {str(path)!r}: {error}") from error


def _position(ranks: Sequence[RankTrace], step: int | None) -> int:
    recorded = min(len(steps_of(rank)) for rank in ranks)
    if step is None:
        step = recorded
    if not 1 <= step <= recorded:
        raise DsError(
            f"ds trace plot: got step {step}, expected 1 to {recorded}, the steps that were "
            f"recorded"
        )
    return step - 1


def _times(rank: RankTrace, lane: str, begin: float, end: float) -> list[Interval]:
    """What to draw on a lane: times within the picture, those that touch joined."""
    gap = (end - begin) * _GAP
    if lane == "compute":
        return intersection(computing(rank), [(begin, end)])
    return intersection(covered(rank.on(lane), gap=gap), [(begin, end)])


def _draw_rank(
    axes: Any, rank: RankTrace, overlap: Overlap, lanes: Sequence[str], begin: float, end: float
) -> None:
    def bars(times: Sequence[Interval]) -> list[Interval]:
        return [((one - begin) / 1e3, (other - one) / 1e3) for one, other in times]

    for each in rank.on("phase"):
        if each.end_us <= begin or each.begin_us >= end:
            continue
        times: list[Interval] = [(max(begin, each.begin_us), min(end, each.end_us))]
        color = _PHASE_COLORS.get(each.name, "#dddddd")
        axes.broken_barh(bars(times), (-0.45, 0.9), facecolors=color)
        if times[0][1] - times[0][0] >= (end - begin) * _NAMED:
            middle = (sum(times[0]) / 2 - begin) / 1e3
            axes.text(middle, 0, each.name, ha="center", va="center", fontsize=8)
    for row, lane in enumerate(lanes, start=1):
        times = _times(rank, lane, begin, end)
        axes.broken_barh(bars(times), (row - 0.4, 0.8), facecolors=_COLORS[lane])
        if lane in COMMUNICATION:
            _name_messages(axes, rank, lane, row, (begin, end))
    axes.set_xlim(0, (end - begin) / 1e3)
    axes.set_ylim(len(lanes) + 0.6, -0.6)
    axes.set_yticks(range(len(lanes) + 1), ["phase", *(_LABELS[lane] for lane in lanes)])
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.grid(axis="x", color="#bbbbbb", linewidth=0.4)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _title(axes, overlap)


def _name_messages(axes: Any, rank: RankTrace, lane: str, row: int, window: Interval) -> None:
    """What each message was for, on those that are long enough to read it."""
    begin, end = window
    for each in rank.on(lane):
        low, high = max(begin, each.begin_us), min(end, each.end_us)
        name = str(each.details.get("for", ""))
        if name and high - low >= (end - begin) * len(name) * _LETTER:
            middle = ((low + high) / 2 - begin) / 1e3
            axes.text(
                middle, row, name, ha="center", va="center", fontsize=7, clip_on=True, color="white"
            )


def _title(axes: Any, overlap: Overlap) -> None:
    axes.set_title(
        f"rank {overlap.rank}: step {overlap.step_us / 1e3:.1f} ms, "
        f"{overlap.compute_us / overlap.step_us:.0%} computing, "
        f"{overlap.hidden_share:.0%} of communication hidden, "
        f"{overlap.wait_us / overlap.step_us:.0%} waiting",
        loc="left",
        fontsize=9,
    )
