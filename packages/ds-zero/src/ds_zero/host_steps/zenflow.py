"""The most important part of each shard is updated at every step, the rest every few steps.

A step on the host takes long; a few elements carry most of a gradient's norm. Of every shard the
blocks with the largest gradients are stepped at once. The gradients of the rest add up, and every
`update_interval` steps the rest is stepped once, with their mean; with `overlap_step` in a thread
beside the next steps, so that the model sees that update one interval later, and no later.

A block is `BLOCK` consecutive elements of a flat shard, not a column of a matrix as in the paper: a
shard is cut anywhere. Adam's averages of the rest decay by `beta ** n` in a step that stands for n,
so those of a block mean the same in either part, and a block that changes sides takes them along;
the learning rate of such a step is `sqrt(n)` times as large, as for a batch n times as large.
It does so only when the rest has just been stepped: no gradient waits then. What waits, and which
elements are important, is part of the optimizer's state, and so of checkpoints.

Costs per element of a shard beside the plain step: 4 bytes of waiting gradient (8 while a thread
takes them), 1 byte of choice, and weights of their own where the model computes in fp32.

Source: Lan et al. 2025, "ZenFlow: Enabling Stall-Free Offloading Training via Asynchronous
Updates", arXiv 2505.12242, sections 3 and 4.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ds_core.flat import Piece
from ds_core.optimizer_state import PortableState, allocate_state_of, is_wide
from ds_core.optimizer_twin import noted_groups, twin_of
from ds_core.seams import tearing
from ds_zero import checks
from ds_zero.errors import ShardError
from ds_zero.host_steps.host_step import HostStep
from ds_zero.host_steps.worker import HostWorker
from ds_zero.inner_step import InnerStep, is_whole
from ds_zero.offload.homes import Homes
from ds_zero.offload.shard_home import DiskShard
from ds_zero.publishing import Publishing
from ds_zero.unit import Unit
from ds_zero.unit_piece import OptimizerPiece

#: Elements that are chosen together.
BLOCK = 256
#: Keys of ours in the state of the optimizer.
WAITING, IMPORTANT, STEPS = "zenflow_waiting", "zenflow_important", "zenflow_steps"
#: In checkpoints: weights as the model saw them, which an update in a thread may be ahead of.
SHOWN = "zenflow_shown"


@dataclass(frozen=True)
class ZenFlow:
    """How much of a shard is updated at every step, and how often the rest.

        ds_zero.shard(model, optimizer, 2, offload=ds_zero.Offload(optimizer="cpu"),
                      zenflow=ds_zero.ZenFlow(topk_ratio=0.05))

    Attributes:
        topk_ratio: share of the blocks that step at once; 1.0 is the plain step, to the bit.
        update_interval: steps from one update of the rest to the next.
        select_interval: steps from one choice of the important to the next; a multiple of it.
        overlap_step: update the rest in a thread, seen one interval later.
        full_warm_up_rounds: plain steps before all that, up to a multiple of `update_interval`.
    """

    topk_ratio: float = 0.1
    update_interval: int = 4
    select_interval: int = 16
    overlap_step: bool = False
    full_warm_up_rounds: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.topk_ratio <= 1.0:
            raise ShardError(
                f"zenflow: topk_ratio: got {self.topk_ratio}, expected more than 0, up to 1"
            )
        for name, least in (("update_interval", 1), ("full_warm_up_rounds", 0)):
            if getattr(self, name) < least:
                raise ShardError(
                    f"zenflow: {name}: got {getattr(self, name)}, expected at least {least}"
                )
        if self.select_interval < 1 or self.select_interval % self.update_interval:
            raise ShardError(
                f"zenflow: select_interval: got {self.select_interval}, expected a multiple of "
                f"update_interval ({self.update_interval}): a block changes sides only when none "
                f"of its gradients waits"
            )

    @property
    def warm_up(self) -> int:
        """Plain steps at the beginning."""
        return -(-self.full_warm_up_rounds // self.update_interval) * self.update_interval


class ZenFlowStep(HostStep):
    """Takes the steps of units as a `ZenFlow` says.

    Args:
        optimizer: the user's, whose groups hold flat shards.
        units: the trained ones.
        homes: where their states live.
        choice: how.
        worker: takes the steps of the rest.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        units: list[Unit],
        homes: Homes,
        choice: ZenFlow,
        worker: HostWorker,
    ) -> None:
        name = type(optimizer).__name__
        if isinstance(optimizer, PortableState) or any(
            is_whole(optimizer, group) for group in optimizer.param_groups
        ):
            raise ShardError(
                f"zenflow: {name} does not keep one number per element for each state, so parts of "
                f"a shard cannot be stepped apart; use AdamW, or leave zenflow out"
            )
        checks.refuse_random_rounding(optimizer, "zenflow", "leave zenflow out")
        super().__init__(optimizer, units, homes, worker)
        self._worker: HostWorker = worker
        self._choice = choice
        # Kernels that write rounded weights differ in the last bits from those that do not.
        self._rounds = {unit.index: unit.rounds for unit in units}
        for unit in units:
            unit.separate_weights()
        self._parts: dict[torch.Tensor, _Part] = {}
        self._done: list[_Rest] = []

    def _update_unit(
        self, unit: Unit, used: list[bool], grad_scale: float | torch.Tensor, step: InnerStep
    ) -> None:
        """Take the step of one unit; afterwards its shard shows what is done by now."""
        if not all(used):
            self.settle()  # its pieces may be cut
        pieces = step.due(unit, used)
        if not pieces:
            return
        unit.settle_gradient()
        with unit.updating(whole=False) as rounded:
            assert rounded is not None
            for piece in pieces:
                steps = self._steps(piece)
                if steps < self._choice.warm_up:
                    step.take(unit, [piece], rounded if self._rounds[unit.index] else None)
                    self._allocate(piece)
                    self._state(piece)[STEPS] = torch.tensor(float(steps + 1))
                    rounded[piece.start : piece.stop].copy_(piece.weights)
                else:
                    self._step(unit, piece, steps + 1, grad_scale, rounded)

    def _state(self, piece: OptimizerPiece) -> dict[str, Any]:
        found: dict[str, Any] = self._optimizer.state[piece.weights]
        return found

    def _steps(self, piece: OptimizerPiece) -> int:
        return int(self._optimizer.state.get(piece.weights, {}).get(STEPS, 0))

    # ------------------------------------------------------------------ one piece

    def _step(
        self,
        unit: Unit,
        piece: OptimizerPiece,
        steps: int,
        grad_scale: float | torch.Tensor,
        rounded: torch.Tensor,
    ) -> None:
        """Step `steps` of a piece; `rounded` gets its new weights."""
        gradient, shown = unit.grad[piece.start : piece.stop], rounded[piece.start : piece.stop]
        part = self._parts.get(piece.weights)
        if part is None:
            part = self._open(unit, piece, gradient)
        self._step_important(unit, part, gradient, grad_scale)
        state, interval = self._state(piece), self._choice.update_interval
        if part.rest:
            state[WAITING].add_(gradient, alpha=float(grad_scale))
        state[STEPS] = torch.tensor(float(steps))
        if steps % interval == 0:
            self._finish(piece)
            shown.copy_(piece.weights)  # as of the last interval, if they overlap
            if part.rest:
                self._begin_rest(unit, piece, steps)
            if steps % self._choice.select_interval == 0 or not self._choice.overlap_step:
                self._finish(piece)
                shown.copy_(piece.weights)
        shown[part.index] = part.weights.detach().to(shown.dtype)
        if steps % self._choice.select_interval == 0:
            self._close(piece)
            state[IMPORTANT].zero_()  # the next step chooses

    def _open(self, unit: Unit, piece: OptimizerPiece, gradient: torch.Tensor) -> _Part:
        """Give the important elements weights and states of their own."""
        weights, state = piece.weights.detach(), self._state(piece)
        self._allocate(piece)
        if not bool(state[IMPORTANT].any()):
            state[IMPORTANT].copy_(important(gradient, self._choice.topk_ratio))
        _fill_gaps(unit, piece, state[IMPORTANT])
        index = state[IMPORTANT].nonzero().flatten()
        own = nn.Parameter(weights[index])
        held = {
            key: value[index] if is_wide(value) else _copied(value)
            for key, value in state.items()
            if key not in (WAITING, IMPORTANT, STEPS)
        }
        part = self._parts[piece.weights] = _Part(piece, own, held, index)
        return part

    def _close(self, piece: OptimizerPiece) -> None:
        """Put the important elements back among the others."""
        part = self._parts.pop(piece.weights, None)
        if part is None:
            return
        state = self._state(piece)
        piece.weights.detach()[part.index] = part.weights.detach()
        for key, value in part.state.items():
            if is_wide(value):
                if key not in state:
                    state[key] = torch.zeros_like(piece.weights.detach(), dtype=value.dtype)
                state[key][part.index] = value
            else:
                state[key] = _copied(value)

    def _step_important(
        self, unit: Unit, part: _Part, gradient: torch.Tensor, scale: float | torch.Tensor
    ) -> None:
        """One plain step of the important elements."""
        with twin_of(self._optimizer) as twin:
            twin.state = defaultdict(dict)
            if part.state:
                twin.state[part.weights] = part.state
            # With nothing left out it is the plain step, on the same tensors.
            mine = gradient[part.index] if part.rest else gradient
            copies = mine.new_empty(mine.shape, dtype=unit.dtype)
            target = _Compact(mine)
            piece = OptimizerPiece(part.piece.group_index, part.weights, 0, mine.numel())
            rounded = copies if self._rounds[unit.index] else None
            InnerStep(twin, scale).take(target, [piece], rounded)
            part.state = twin.state[part.weights]

    def _begin_rest(self, unit: Unit, piece: OptimizerPiece, steps: int) -> None:
        """Begin to step the rest with what has waited."""
        state, interval = self._state(piece), self._choice.update_interval
        part = self._parts[piece.weights]
        mean = state[WAITING] / interval
        mean[part.index] = 0.0  # their place among the others is overwritten in the end
        state[WAITING].zero_()
        # How many such steps there have been: as the important count, in intervals.
        count = max(0.0, round(float(part.state.get("step", steps)) / interval) - 1.0)
        to = unit.dtype if self._rounds[unit.index] else None
        groups = noted_groups(self._optimizer)
        work = partial(self._step_rest, piece, mean, count, to, groups)
        self._done.append(_Rest(piece, self._worker.start(work), mean.nbytes))

    def _step_rest(
        self,
        piece: OptimizerPiece,
        mean: torch.Tensor,
        count: float,
        to: torch.dtype | None,
        groups: list[dict[str, Any]],
    ) -> None:
        """One step that stands for an interval; in the worker."""
        interval, state = self._choice.update_interval, self._state(piece)
        held = {k: v for k, v in state.items() if k not in (WAITING, IMPORTANT, STEPS)}
        if "step" in held:
            held["step"] = torch.full_like(held["step"], count)
        with twin_of(self._optimizer, groups) as twin:
            twin.state = defaultdict(dict)
            if held:
                twin.state[piece.weights] = held
            with _standing_for(twin, interval):
                rounded = None if to is None else mean.new_empty(mean.shape, dtype=to)
                place = OptimizerPiece(piece.group_index, piece.weights, 0, mean.numel())
                InnerStep(twin, 1.0).take(_Compact(mean), [place], rounded)
            for key, value in twin.state[piece.weights].items():
                if key not in state:
                    state[key] = value

    # ------------------------------------------------------------------ as a whole

    def _finish(self, piece: OptimizerPiece) -> None:
        """Wait for the step of the rest of a piece."""
        for entry in [each for each in self._done if each.piece is piece]:
            self._done.remove(entry)
            entry.done.result()

    def settle(self) -> None:
        """Wait for what is under way; weights and states of the optimizer are all in place."""
        with tearing(self, "a step of what ZenFlow leaves for later"):
            while self._done:
                self._done.pop().done.result()
            for part in list(self._parts.values()):
                self._close(part.piece)

    def drop(self) -> None:
        """Wait for what is under way, whatever becomes of it."""
        wait([entry.done for entry in self._done])
        self._done.clear()
        self._parts.clear()

    def close(self, *, is_torn: bool) -> None:
        """See `HostStep.close`; weights of the optimizer may be ahead of the model's."""
        if not is_torn:
            publishing = Publishing()
            for unit in self._units:
                publishing.attempt(unit.refresh)
                publishing.publish(unit)
            publishing.finish()
        super().close(is_torn=is_torn)

    def shown_state(self) -> dict[str, dict[str, Any]]:
        """The weights that the model sees, by `SHOWN` and parameter, where others may be ahead.

        With them a run that resumes sees each update when the run that saved does, and saving
        changes nothing for either.
        """
        if not self._shows_apart:
            return {}
        found: dict[str, Any] = {}
        for unit in self._units:
            for part in unit.layout.pieces(unit.group.rank):
                if self._optimizer.state.get(unit.piece_at(part.offset).weights):
                    found[part.slot.name] = _shown(unit, part)
        return {SHOWN: found}

    @property
    def _shows_apart(self) -> bool:
        """Whether the weights of the optimizer may be ahead of those that the model sees."""
        return self._choice.overlap_step and self._choice.topk_ratio < 1.0

    def refresh(self, unit: Unit, loaded: Mapping[str, Any]) -> None:
        """Let a shard show what the model of the checkpoint saw, if that was `loaded`."""
        if SHOWN not in loaded or not self._shows_apart:
            unit.refresh()
            return
        with unit.updating(whole=False):
            pass  # it was written where updates leave it

    def passing_state(self) -> dict[str, str]:
        """Our keys, and what is lost now without each."""
        waits = 0
        for piece in (piece for unit in self._units for piece in unit.optimizer_pieces):
            steps = self._steps(piece)
            if steps > self._choice.warm_up and self._choice.topk_ratio < 1.0:
                waits = max(waits, steps % self._choice.update_interval)
        told = f"the gradients of {waits} steps, which the less important part waited with"
        return {WAITING: told if waits else "", IMPORTANT: "", STEPS: "", SHOWN: ""}

    def buffer_bytes(self) -> int:
        """Bytes of what is stepped apart now, and of the mean gradients of steps under way."""
        own = sum(part.nbytes for part in self._parts.values())
        return own + sum(rest.nbytes for rest in self._done)

    def allocate(self, pieces: list[OptimizerPiece]) -> None:
        """Give states that a checkpoint is to fill ours too."""
        for piece in pieces:
            self._allocate(piece)
            self._state(piece).setdefault(STEPS, torch.zeros(()))

    def _allocate(self, piece: OptimizerPiece) -> None:
        state, shape = self._state(piece), piece.weights.shape
        if not state:
            for rest in self._done:
                rest.done.result()  # or it could see the groups of a step that is none
            group = self._optimizer.param_groups[piece.group_index]
            allocate_state_of(self._optimizer, group, piece.weights)
            state = self._state(piece)
        state.setdefault(WAITING, torch.zeros(shape, dtype=torch.float32))
        state.setdefault(IMPORTANT, torch.zeros(shape, dtype=torch.uint8))


@dataclass(frozen=True, eq=False)
class _Rest:
    """A step of the rest of a piece that was begun; `nbytes` of its mean gradient."""

    piece: OptimizerPiece
    done: Future[None]
    nbytes: int


@dataclass
class _Part:
    """The important elements of a piece, apart from the others.

    Attributes:
        piece: of which.
        weights, state: of the optimizer, `[k]`.
        index: their places in the piece, `[k]`, ascending.
    """

    piece: OptimizerPiece
    weights: nn.Parameter
    state: dict[str, Any]
    index: torch.Tensor

    @property
    def rest(self) -> bool:
        """Whether there are others."""
        return self.index.numel() < self.piece.weights.numel()

    @property
    def nbytes(self) -> int:
        """Of its memory."""
        states = sum(value.nbytes for value in self.state.values() if is_wide(value))
        return self.weights.nbytes + self.index.nbytes + states


class _Compact:
    """Elements to be stepped that are no unit: see `inner_step.Stepped`."""

    states = "cpu"

    def __init__(self, gradient: torch.Tensor) -> None:
        self.grad = gradient

    def settle_gradient(self) -> None:
        """The gradient is here."""

    @contextmanager
    def stepping(self, piece: OptimizerPiece, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Weights and states are here."""
        yield


def important(gradient: torch.Tensor, ratio: float) -> torch.Tensor:
    """Which elements of a flat gradient are in the blocks with the largest norms, `[n]`, uint8.

    Args:
        gradient: `[n]`.
        ratio: share of the blocks, at least one.
    """
    numel = gradient.numel()
    count = -(-numel // BLOCK)
    padded = torch.zeros(count * BLOCK, dtype=torch.float32, device=gradient.device)
    padded[:numel] = gradient
    norms = padded.view(count, BLOCK).square().sum(1)
    chosen = torch.zeros(count, dtype=torch.uint8, device=gradient.device)
    chosen[norms.topk(min(count, max(1, round(ratio * count)))).indices] = 1
    return chosen.repeat_interleave(BLOCK)[:numel].cpu()


def at_most_important(numel: int, ratio: float, gap: int) -> int:
    """The most elements that `important` chooses, with gaps filled as their neighbours."""
    count = -(-numel // BLOCK)
    return min(numel, min(count, max(1, round(ratio * count))) * BLOCK + gap)


def state_itemsize() -> int:
    """Bytes per element of the states that are ours: gradients that wait, and the choice."""
    return torch.float32.itemsize + torch.uint8.itemsize


def _fill_gaps(unit: Unit, piece: OptimizerPiece, chosen: torch.Tensor) -> None:
    """Let the padding after a parameter be as its last element: no checkpoint has it."""
    parts = unit.parts_of(piece)
    for part, following in pairwise(parts):
        end = part.offset + part.stop - part.start - piece.start
        if end > 0:
            chosen[end : following.offset - piece.start] = chosen[end - 1]


@contextmanager
def _standing_for(optimizer: torch.optim.Optimizer, steps: int) -> Iterator[None]:
    """Inside, one step with a mean gradient stands for as many steps.

    Averages decay as in all of them. The rate of optimizers that average, whose steps are as long
    whatever the gradient's scale, grows with the root of their number, as for a larger batch; that
    of others with the number itself, so that every gradient counts once.
    """
    before: list[Mapping[str, Any]] = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        averages = "betas" in group
        if averages:
            group["betas"] = tuple(beta**steps for beta in group["betas"])
        group["lr"] = group["lr"] * (math.sqrt(steps) if averages else steps)
    try:
        yield
    finally:
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})


def _shown(unit: Unit, part: Piece) -> Any:
    """A `FlatShard` of the weights of a part that the model sees."""
    from ds_core.checkpoint import FlatShard

    source, shape = unit.shown, part.slot.shape
    start, stop = part.offset, part.offset + part.stop - part.start
    if isinstance(source, torch.Tensor):
        return FlatShard(source[start:stop], shape, part.start)
    home = source
    assert isinstance(home, DiskShard)
    return FlatShard.lazy(
        stop - start,
        unit.dtype,
        shape,
        part.start,
        read=lambda: home.read(start, stop),
        write=lambda values: home.write(start, values),
    )


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
