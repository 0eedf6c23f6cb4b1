"""Records phases, operations and collectives of this rank, and writes them on one clock."""

from __future__ import annotations

import logging
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

import torch
import torch.distributed as dist

from ds_core import comm
from ds_core.comm import Ledger, Span
from ds_core.errors import DsError
from ds_core.tracing.clock import Clock, aligned_clock
from ds_core.tracing.lanes import RankTrace, Slice, load_folder, merge, rows_of
from ds_core.tracing.torch_ops import TorchOps

logger = logging.getLogger(__name__)

#: The file of all ranks, beside the `rank*.json` of each.
MERGED = "trace.json"
_LANE_OF_OP = {
    "all_gather": "gather",
    "reduce_scatter": "reduce",
    "all_reduce": "reduce",
    "reduce": "reduce",
}


class Recorder:
    """Watches a mesh, and torch, from `start` to `stop`; made on every rank.

    Args:
        mesh: whose collectives are recorded.
        folder: for `rank*.json` of each rank and `trace.json` of all, which ui.perfetto.dev and
            `ds trace` read; those of an earlier recording are replaced. Best one that all ranks
            share; if they do not, copy the files together and call `ds trace merge`.
        device: where the model is.
        ops: also record torch's operations; without, phases stand for compute.
        shapes: with them, the shapes of their inputs.
    """

    def __init__(
        self,
        mesh: comm.Mesh,
        folder: str | PathLike[str],
        *,
        device: torch.device | None = None,
        ops: bool = True,
        shapes: bool = False,
    ) -> None:
        self._ledger, self._folder = mesh.ledger, Path(folder)
        kind = "cpu" if device is None else device.type
        self._ops = TorchOps(kind, shapes=shapes) if ops else None
        # Of its own, so that what it sends is neither counted nor recorded.
        everybody = range(dist.get_world_size())
        group = dist.group.WORLD if len(everybody) > 1 else None
        self._world = comm.Group("trace", everybody, group, Ledger())
        self._clock = Clock()
        self._recording = ""
        self._ranges: list[tuple[str, str, int, int]] = []
        self._spans: list[Span] = []
        self._stop_watching = lambda: None
        self.is_recording = False

    def start(self) -> None:
        """Begin. Collective over all ranks."""
        if self.is_recording:
            raise DsError("trace: recording has begun already; call stop() first")
        mine = uuid.uuid4().hex
        self._recording = comm.broadcast_object(mine, self._world, caller="trace")
        if self._world.rank == 0:
            # `stop` tells of a folder that cannot be written, when no rank waits for another.
            with suppress(OSError):
                for path in [*self._folder.glob("rank*.json"), self._folder / MERGED]:
                    path.unlink(missing_ok=True)
        if self._ops is not None:
            self._ops.start()
        # Last, so that ranks begin together.
        self._clock = aligned_clock(self._world)
        self._stop_watching = self._ledger.watch(self._spans.append)
        self.is_recording = True

    def add(self, lane: str, name: str, begin_ns: int, end_ns: int) -> None:
        """Put a slice of your own on a lane; times are those of `time.perf_counter_ns`."""
        self._ranges.append((lane, name, begin_ns, end_ns))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is in the block is called `name` on the lane of phases."""
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add("phase", name, begin, time.perf_counter_ns())

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """What is in the block is one step; overlap is told step by step."""
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add("step", f"step {number}", begin, time.perf_counter_ns())

    def stop(self) -> Path:
        """End, write this rank's file, and on rank 0 that of all; returns this rank's.

        Collective over all ranks. Raises DsError if a file cannot be written.
        """
        self._stop_watching()
        self.is_recording = False
        slices = [
            Slice(lane, name, self._clock.us(begin), self._clock.us(end))
            for lane, name, begin, end in self._ranges
        ]
        if self._ops is not None:
            slices += [self._on_shared_clock(each) for each in self._ops.stop()]
        has_kernels = any(each.lane == "host" for each in slices)
        slices += self._communication(on_host=has_kernels)
        path = self._folder / f"rank{self._world.rank}.json"
        trace = RankTrace(
            self._world.rank,
            self._world.size,
            platform.node(),
            self._recording,
            tuple(slices),
            has_ops=self._ops is not None,
        )
        # A rank that cannot write meets the others all the same, or they would wait for it.
        problem = _attempt(lambda: trace.save(path))
        comm.barrier(self._world, caller="trace")
        if self._world.rank == 0 and problem is None:
            problem = _attempt(self._merge)
        comm.barrier(self._world, caller="trace")
        if problem is not None:
            raise problem
        return path

    def abandon(self) -> None:
        """End without writing anything, after an error. Not collective."""
        self._stop_watching()
        self.is_recording = False
        if self._ops is not None:
            self._ops.abandon()

    def _on_shared_clock(self, each: Slice) -> Slice:
        begin, end = (self._clock.us(us * 1e3) for us in (each.begin_us, each.end_us))
        return Slice(each.lane, each.name, begin, end, each.row, each.details)

    def _communication(self, *, on_host: bool) -> list[Slice]:
        """The collectives: on a device its kernels tell when they ran, and these are the calls."""
        lanes: dict[str, list[Slice]] = {}
        for span in self._spans:
            lane = "calls" if on_host else _LANE_OF_OP.get(span.op, "other")
            issued, waited, done = map(
                self._clock.us, (span.issued_ns, span.waited_ns, span.done_ns)
            )
            details = {
                "operation": span.op,
                "for": span.caller,
                "group": f"{span.group} ({span.group_size} ranks)",
                "sent bytes": span.sent_bytes,
                "waited for us": round(max(0.0, done - waited), 3),
            }
            name = f"{span.op} {span.caller}".strip()
            lanes.setdefault(lane, []).append(Slice(lane, name, issued, done, 0, details))
            if done > waited:
                lanes.setdefault("wait", []).append(
                    Slice("wait", f"for {name}", waited, done, 0, details)
                )
        return [each for lane in lanes.values() for each in rows_of(lane)]

    def _merge(self) -> None:
        ranks = load_folder(self._folder)
        if len(ranks) < self._world.size:
            logger.warning(
                "trace: %s holds %d of %d ranks, because not all of them write there; copy the "
                "others' rank*.json into it and call `ds trace merge`",
                self._folder,
                len(ranks),
                self._world.size,
            )
        merge(ranks, self._folder / MERGED)


def _attempt(write: Callable[[], object]) -> DsError | None:
    """Why a file could not be written, or None."""
    try:
        write()
    except DsError as error:
        return error
    return None


@contextmanager
def record(
    mesh: comm.Mesh,
    folder: str | PathLike[str],
    *,
    device: torch.device | None = None,
    ops: bool = True,
    shapes: bool = False,
) -> Iterator[Recorder]:
    """Record the block of a training loop of your own; see `Recorder`. Collective."""
    recorder = Recorder(mesh, folder, device=device, ops=ops, shapes=shapes)
    recorder.start()
    try:
        yield recorder
    except BaseException:
        recorder.abandon()
        raise
    recorder.stop()
