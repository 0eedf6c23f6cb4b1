"""A step that the host and the device take together, each of its own units.

Part of the optimizer's states stays on the device (`Offload.ratio`), and both parts are updated at
the same time, the host's in a thread of its own. The step is over when both are, so the best ratio
is that at which they finish together. With "auto" it is found: half of the elements leave at first,
a few steps are measured, and then states move once to where the step is shortest.

A choice is of whole units: with U of the same size the step is at most 1 + 1/U times the shortest.

Source: DeepSpeed 2023, "ZeRO-Offload++: 6x Higher Training Throughput via Collaborative CPU/GPU
Twin-Flow" (blog); Ren et al. 2021, "ZeRO-Offload", section 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from ds_core import comm
from ds_core.optimizer_twin import twin_of
from ds_zero import checks
from ds_zero.host_steps.host_step import HostStep
from ds_zero.host_steps.worker import HostWorker
from ds_zero.inner_step import InnerStep, is_all_of
from ds_zero.offload.choice import Tier, nearest_split
from ds_zero.offload.homes import Homes
from ds_zero.publishing import Publishing
from ds_zero.unit import Unit
from ds_zero.unit_piece import OptimizerPiece

#: Steps that "auto" lets pass, since they allocate, and then measures.
WARM_UP, MEASURED = 2, 5


def best_split(sizes: Sequence[int], host_rate: float, device_rate: float) -> list[bool]:
    """Which units the host should update, so that it and the device finish soonest.

    Args:
        sizes: elements of each unit.
        host_rate, device_rate: seconds per element of each side.

    Returns:
        By unit; the last ones leave first, as in `Offload.states_of`. At equal times the device
        keeps more: it has no copies to make.
    """
    total = sum(sizes)

    def needed(leaves: list[bool]) -> float:
        leaving = sum(size for size, leave in zip(sizes, leaves, strict=True) if leave)
        return max(host_rate * leaving, device_rate * (total - leaving))

    candidates = [[index >= first for index in range(len(sizes))] for first in range(len(sizes))]
    # Where the last unit is too large to leave, smaller ones before it may.
    wanted = total * device_rate / max(host_rate + device_rate, 1e-30)
    candidates.append(nearest_split(sizes, wanted))
    return min([[False] * len(sizes), *candidates], key=needed)


#: Whether the step of a unit was taken already: of (unit, used, grad_scale).
Taken = Callable[[Unit, list[bool], float | torch.Tensor], bool]


def _never(unit: Unit, used: list[bool], grad_scale: float | torch.Tensor) -> bool:
    """No unit was updated already."""
    return False


class TwinFlow(HostStep):
    """Steps units on the host and on the device at the same time.

    Args:
        optimizer: the user's, whose groups hold flat shards.
        units: the trained ones.
        homes: what leaves the device, with its `ratio`.
        group: ranks that choose one ratio, if it is "auto".
        worker: the host's thread.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        units: list[Unit],
        homes: Homes,
        group: comm.Group,
        worker: HostWorker,
    ) -> None:
        checks.refuse_random_rounding(optimizer, "ratio", "give ratio 0 or 1")
        super().__init__(optimizer, units, homes, worker)
        self._worker: HostWorker = worker
        self._group = group
        self._measures = homes.offload.ratio == "auto" and len(units) > 1
        # Seconds per element of steps so far: of the host, and of the device.
        self._rates: list[tuple[float, float]] = []
        self._steps = 0
        self._chosen: list[Tier] | None = None

    def _update_units(
        self, used: dict[int, list[bool]], grad_scale: float | torch.Tensor, step: InnerStep
    ) -> None:
        self.run(used, grad_scale, step)

    def run(
        self,
        used: dict[int, list[bool]],
        grad_scale: float | torch.Tensor,
        step: InnerStep,
        unless: Taken = _never,
    ) -> None:
        """Update all units and publish them. Collective; first those on the device, in order.

        unless: whether one on the host was updated already.
        """
        publishing, host = Publishing(), _HostPart()
        for unit in self._on("host"):
            publishing.attempt(
                partial(self._begin, host, unit, used[unit.index], grad_scale, step, unless)
            )
        watch = _Stopwatch(self._units[0].full.device)
        for unit in self._on("device"):
            publishing.attempt(partial(step.run, unit, used[unit.index]))
            watch.lap()
            publishing.publish(unit)
        for unit in self._on("host"):
            publishing.attempt(partial(host.end, unit))
            publishing.publish(unit)
        host.wait()  # also after an error
        publishing.finish()
        if self._measures:
            self._measure(sum(host.seconds), watch)

    def _begin(
        self,
        host: _HostPart,
        unit: Unit,
        used: list[bool],
        grad_scale: float | torch.Tensor,
        step: InnerStep,
        unless: Taken,
    ) -> None:
        """Begin the host's part of one unit, in the worker."""
        pieces = [] if unless(unit, used, grad_scale) else step.due(unit, used)
        if not pieces:
            return
        stack = ExitStack()
        rounded = stack.enter_context(unit.updating(whole=is_all_of(unit, pieces)))
        work = partial(self._take, unit, pieces, rounded, grad_scale, host)
        host.begun[unit.index] = self._worker.start(work), stack

    def _take(
        self,
        unit: Unit,
        pieces: list[OptimizerPiece],
        rounded: torch.Tensor | None,
        grad_scale: float | torch.Tensor,
        host: _HostPart,
    ) -> None:
        with host.timed(), twin_of(self._optimizer) as twin:
            InnerStep(twin, grad_scale).take(unit, pieces, rounded)

    def _on(self, side: str) -> list[Unit]:
        return [unit for unit in self._units if (unit.states == "device") == (side == "device")]

    # ------------------------------------------------------------------ auto

    def _measure(self, host_seconds: float, watch: _Stopwatch) -> None:
        """Note the rates of a step; after enough of them, choose. Collective then."""
        self._steps += 1
        if self._steps <= WARM_UP:
            return
        host, device = sum(_sizes(self._on("host"))), sum(_sizes(self._on("device")))
        self._rates.append((host_seconds / max(1, host), watch.seconds() / max(1, device)))
        if len(self._rates) < MEASURED:
            return
        self._measures = False
        mine = torch.tensor(self._rates, dtype=torch.float64).quantile(0.5, dim=0)
        mine = mine.to(self._units[0].full.device)
        everybody = torch.empty(2 * self._group.size, dtype=mine.dtype, device=mine.device)
        comm.all_gather(everybody, mine, self._group, caller="rates of host and device")
        # A step ends with its slowest rank.
        rates = everybody.view(-1, 2).amax(0).tolist()
        leaves = best_split(_sizes(self._units), *rates)
        self._chosen = [self._homes.offload.optimizer if leave else "device" for leave in leaves]

    def move(self) -> None:
        """Let states move to where they were chosen to be; only while there are no gradients."""
        chosen, self._chosen = self._chosen, None
        for unit, tier in zip(self._units, chosen or (), strict=False):
            unit.move_states(tier, self._optimizer)

    def forget(self, *, is_torn: bool) -> None:
        """See `HostStep.forget`."""
        super().forget(is_torn=is_torn)
        self.move()


class _HostPart:
    """What the host does in one step: by unit what was begun, and the seconds of all that it did.

    Both threads add to them.
    """

    def __init__(self) -> None:
        self.begun: dict[int, tuple[Future[None], ExitStack]] = {}
        self.seconds: list[float] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The time of the block counts, if no error ends it."""
        begin = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - begin)

    def end(self, unit: Unit) -> None:
        """Wait for a unit, if it was begun, and leave its weights where the model has them."""
        if unit.index in self.begun:
            done, stack = self.begun[unit.index]
            done.result()
            with self.timed():
                stack.close()

    def wait(self) -> None:
        """Nothing is under way, whatever becomes of it."""
        wait([done for done, _ in self.begun.values()])


def _sizes(units: list[Unit]) -> list[int]:
    return [sum(param.numel() for param in unit.params) for unit in units]


class _Stopwatch:
    """Time from now to the last lap, as the device's own work takes it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self._end = self._now()

    def _now(self) -> float | torch.Event:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def lap(self) -> None:
        """The work queued so far counts."""
        self._end = self._now()

    def seconds(self) -> float:
        """Waits until that work is done."""
        if isinstance(self._begin, torch.Event):
            assert isinstance(self._end, torch.Event)
            self._end.synchronize()
            return self._begin.elapsed_time(self._end) / 1e3
        assert isinstance(self._end, float)
        return self._end - self._begin
