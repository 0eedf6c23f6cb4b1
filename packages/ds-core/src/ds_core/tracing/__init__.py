"""Time lines of every rank: compute, gathers, reductions, waits, and how much they overlap.

    with tracing.record(mesh, "trace") as recorder:
        for number in range(2):
            with recorder.step(number):
                train_one_step()

or `"trace": {"enabled": true}` in a config. Then `ds trace summary trace`, `ds trace plot
trace`, or open `trace/trace.json` in ui.perfetto.dev.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core._lazy import lazy_names

if TYPE_CHECKING:
    from ds_core.tracing.lanes import RankTrace, Slice, load_folder, merge
    from ds_core.tracing.observer import Trace
    from ds_core.tracing.overlap import Overlap, overlap_of
    from ds_core.tracing.recorder import Recorder, record

_HOMES = {
    "Overlap": "overlap",
    "RankTrace": "lanes",
    "Recorder": "recorder",
    "Slice": "lanes",
    "Trace": "observer",
    "load_folder": "lanes",
    "merge": "lanes",
    "overlap_of": "overlap",
    "record": "recorder",
}

__all__ = [
    "Overlap",
    "RankTrace",
    "Recorder",
    "Slice",
    "Trace",
    "load_folder",
    "merge",
    "overlap_of",
    "record",
]

# Reading traces needs no torch.
__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
