"""One unit: the flat buffers of parameters that travel together, and who owns which part.

Per unit of `numel` elements over N ranks (bytes per element: p of the parameters, g of gradients):

| buffer    | what it holds                                   | stage 1  | stage 2  | stage 3    |
|-----------|-------------------------------------------------|----------|----------|------------|
| `full`    | all parameters; the model's are views of it     | p numel  | p numel  | transient  |
| `shard`   | this rank's 1/N of them                         | in full  | in full  | p numel/N  |
| `twin`    | local gradients, each written once by autograd  | g numel  | transient| transient  |
| `grad`    | this rank's 1/N of the averaged gradient        | in twin  | g numel/N| g numel/N  |
| `master`  | this rank's 1/N of the fp32 copy, if any         | 4 numel/N| 4 numel/N| 4 numel/N  |

With one rank `grad` lies in the twin at every stage. Offloaded states (ds_zero.offload) live on
the host: `master` and `grad` too, where that is not the device; or on disk: `master` then has
memory piece by piece, in a step. An offloaded `shard` has memory only while its unit is whole.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", section 5; the flat layout is ours (docs/design.md, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import nn

from ds_core import comm
from ds_core.flat import Piece
from ds_core.flat_gradient import FlatGradient
from ds_core.optimizer_state import devices_of_state
from ds_core.precision import Precision
from ds_core.seams import Transport
from ds_zero.errors import ShardError
from ds_zero.holdings import Holding, Place
from ds_zero.offload.choice import Offload, Tier
from ds_zero.offload.crossing import Crossing, host_empty
from ds_zero.offload.homes import Homes
from ds_zero.offload.shard_home import HostShard, ShardHome, memory_of
from ds_zero.plan import UnitSpec
from ds_zero.sharded_param import Keeper, hide, show
from ds_zero.unit_homes import UnitHomes
from ds_zero.unit_piece import OptimizerPiece, optimizer_ranges, unit_layout


class Unit(UnitHomes):
    """Flat storage of one unit on this rank.

    Args:
        index: position among all units, the same on all ranks.
        spec: its parameters and modules.
        group: ranks over which it is sharded.
        stage: 1, 2 or 3, what is sharded: optimizer state, + gradients, + parameters.
        precision: dtypes of parameters, master copy and gradients.
        values: full value of a parameter of the spec (one that `Init` sharded is gathered).
        broadcast: whether rank 0's initial values overwrite the others'.
        transport: how parameters and gradients travel.
        reduce_group: the same ranks, on whose lane gradients travel; default: `group` itself.
        homes: where what is offloaded goes; None: nothing is.
        states: where this unit's optimizer states live.
        consumed: whether its gradient is used up as soon as it is complete, and has no memory
            between backwards.

    Collective over `group`.
    """

    def __init__(
        self,
        index: int,
        spec: UnitSpec,
        group: comm.Group,
        *,
        stage: int,
        precision: Precision,
        values: Callable[[nn.Parameter], torch.Tensor],
        broadcast: bool,
        transport: Transport,
        reduce_group: comm.Group | None = None,
        homes: Homes | None = None,
        states: Tier = "device",
        consumed: bool = False,
    ) -> None:
        self._homes = homes or Homes(Offload(), spec.params[0].param.device, 0)
        self.states: Tier = states if spec.trainable else "device"
        self._consumed = consumed
        self.index, self.name, self.group = index, spec.name, group
        self._reduce_group = reduce_group or group
        self._wire = transport
        self.modules, self.is_root, self.trainable = spec.modules, spec.is_root, spec.trainable
        self.is_tile = spec.is_tile
        self.specs = spec.params
        self.params = [s.param for s in spec.params]
        # With one rank there is nothing to gather: stage 3 keeps the parameters where they are.
        self.stage = stage if group.size > 1 or self._homes.shards_leave() else min(stage, 2)
        floating = spec.dtype.is_floating_point
        self.dtype = (precision.compute if floating else None) or spec.dtype
        self.layout = unit_layout(spec, self.dtype, group.size)
        self.grad_dtype = precision.grad or self.dtype
        own = self.layout.shard_numel
        self.crossing: Crossing | None = self._homes.crossing(self.states, own, self.grad_dtype)
        self.shard_home: ShardHome | None = None
        self._fill(values, precision, broadcast)
        self.optimizer_pieces = self._cut_for_optimizer() if self.trainable else []
        self.unstepped = set()
        # Stage 1 keeps full-size gradients anyway, and one rank's part is all: the average is
        # among them, unless it leaves the device.
        same = self.grad_dtype == self.dtype and self.trainable
        self._may_be_in_twin = (stage == 1 or group.size == 1) and same
        self._no_gradient()

    def _no_gradient(self) -> None:
        self.grad, self._grad_in_twin = torch.empty(0), False
        if self.trainable:
            self._allocate_gradients()
        #: Whether `grad` holds something that the next reduction must be added to.
        self.has_grad = False
        #: Called when the average of its gradients is complete.
        self.on_reduced: Callable[[Unit], None] = _nothing
        #: Called before another average is added to one that is here.
        self.on_added: Callable[[Unit], None] = _nothing

    # ------------------------------------------------------------------ parameters

    def _fill(
        self, values: Callable[[nn.Parameter], torch.Tensor], precision: Precision, broadcast: bool
    ) -> None:
        """Copy the parameters into the flat buffer, keep this rank's part, point views at it."""
        device = self.params[0].device
        wide = self.dtype
        if precision.master is not None and self.trainable:
            wide = torch.promote_types(self.dtype, precision.master)
        staging = torch.zeros(self.layout.numel, dtype=wide, device=device)
        with torch.no_grad():
            for slot, param in zip(self.layout.slots, self.params, strict=True):
                staging[slot.offset : slot.end].view(slot.shape).copy_(values(param))
        if broadcast:
            comm.broadcast(staging, self.group, caller=f"{self.name} (initial values)")
        own = self._own(staging)
        self.master = own.clone() if wide != self.dtype else None
        if self.crossing is not None:
            self.master = host_empty(own.numel(), wide, pin=self._homes.offload.pin_memory)
            self.master.copy_(own)
        self.full = staging.to(self.dtype)
        self.shard = own.to(self.dtype, copy=True) if self.stage == 3 else self._own(self.full)
        self._find_homes()
        self._views = [
            self.full[slot.offset : slot.end].view(slot.shape) for slot in self.layout.slots
        ]
        for param, view in zip(self.params, self._views, strict=True):
            show(param, view)

    def _own(self, flat: torch.Tensor) -> torch.Tensor:
        size = self.layout.shard_numel
        return flat[self.group.rank * size : (self.group.rank + 1) * size]

    def start_gather(self) -> comm.Pending:
        """Allocate the full parameters and start filling them. Collective over the group."""
        if self.shard_home is None and self.shard.numel() > 0 and not self._shard_is_here:
            raise ShardError(
                f"{self.name}: its parameters are parked by offload_states(); call "
                f"reload_states() first, on all ranks"
            )
        if self.shard_home is not None:
            self._bring_shard(fill=True)
        if not self.is_full:
            self.full.untyped_storage().resize_(self.full.numel() * self.full.element_size())
        return self._wire.all_gather(self.full, self.shard, self.group, caller=self.name)

    def fetch_ahead(self) -> None:
        """The unit is gathered soon: begin to fetch its shard, if it lives elsewhere."""
        if self.shard_home is not None:
            self.shard_home.ahead()

    def show(self) -> None:
        """Give the parameters their gathered values."""
        for param, view in zip(self.params, self._views, strict=True):
            show(param, view)

    def free(self, keeper: Keeper) -> None:
        """Drop the full parameters; tensors that autograd saved see them again once regathered."""
        for param in self.params:
            hide(param, keeper)
        self.full.untyped_storage().resize_(0)
        self._leave_shard()

    def publish(self) -> comm.Pending | None:
        """Make an updated shard visible: where the full parameters are present, start a gather.

        Collective over the group in that case.
        """
        if self.stage < 3 or self.is_full:
            return self.start_gather()
        return None

    @torch.no_grad()
    def adopt_full(self) -> None:
        """Take this rank's share over from the full parameters, which were edited."""
        own = self._own(self.full)
        if self.master is not None:
            for piece in self.optimizer_pieces:
                with self.present(piece, edits=True):
                    edited, wide = own[piece.start : piece.stop], piece.weights.detach()
                    # What was not edited keeps the digits that only the master copy has.
                    is_same = edited == wide.to(edited.dtype)
                    piece.weights.copy_(torch.where(is_same, wide, edited.to(wide.dtype)))
        with self.updating(whole=True) as rounded:
            (self.shard if rounded is None else rounded).copy_(own)

    def end_training(self) -> None:
        """Free the master copy and the gradients; the parameters can still be gathered."""
        if self.trainable:
            self.settle_gradient()
            self.twin.forget()
        self.crossing = self._outgoing = self.master = None
        self.optimizer_pieces, self.grad, self.has_grad = [], torch.empty(0), False
        if hasattr(self, "twin"):
            del self.twin

    # ------------------------------------------------------------------ gradients

    def _allocate_gradients(self) -> None:
        self._grad_in_twin = self._may_be_in_twin and self.crossing is None
        device, in_twin = self.full.device, self._grad_in_twin
        transient = self._consumed or not in_twin
        self.twin = FlatGradient(self.layout, self.dtype, device, transient=transient)
        own = self.layout.shard_numel
        if in_twin:
            with memory_of(self.twin.flat) if transient else nullcontext():
                self.grad = self._own(self.twin.flat)
        elif self.crossing is not None:
            self.grad = self.crossing.gradient.zero_()
        else:
            self.grad = torch.zeros(own, dtype=self.grad_dtype, device=device)
            if self._consumed:
                self.grad.untyped_storage().resize_(0)

    @property
    def used(self) -> list[bool]:
        """Which parameters received a gradient since the last `zero_grad`."""
        return self.twin.used

    def write_gradient(self, position: int, gradient: torch.Tensor, factor: float) -> None:
        """Write (or add) `factor * gradient` of one parameter into the twin.

        The factor is 1/N, so that the sum over ranks is the average; folding it into this copy
        makes it free.
        """
        if self.has_grad and self._grad_in_twin:
            self._reopen()
        self.twin.write(position, gradient, factor)

    def _reopen(self) -> None:
        """Accumulate on top of a reduced gradient that lies in the twin (stage 1).

        This rank's part keeps the averaged sum so far; the other parts were handed over and
        start again from zero, so that the next reduction counts each contribution once.
        """
        size, flat = self.layout.shard_numel, self.twin.flat
        flat[: self.group.rank * size].zero_()
        flat[(self.group.rank + 1) * size :].zero_()
        self.twin.keep()
        self.has_grad = False

    def start_reduce(self) -> comm.Pending:
        """Start averaging the twin into `grad`; gradients that did not come count as zero.

        Collective over the group.
        """
        if self.has_grad and self._grad_in_twin:
            self._reopen()
        self._reduced = self.grad
        if self.crossing is not None:
            own, device = self.layout.shard_numel, self.full.device
            self._reduced = torch.empty(own, dtype=self.grad_dtype, device=device)
        elif self._consumed and not self._grad_in_twin and not self.has_grad:
            self.grad.untyped_storage().resize_(self.grad.nbytes)
        return self._wire.reduce_scatter(
            self._reduced,
            self.twin.complete(),
            self._reduce_group,
            accumulate=self.has_grad and self.crossing is None,
            caller=self.name,
        )

    def finish_reduce(self) -> None:
        """The reduction is complete: what of the gradient is not here any more loses its memory."""
        if self.has_grad:
            self.on_added(self)
        if self.crossing is not None:
            self.crossing.send_gradient(self._reduced, accumulate=self.has_grad)
        self._reduced = self.grad
        self.has_grad = True
        if not self._grad_in_twin or not self._consumed:
            self.twin.release()
        self.on_reduced(self)

    def settle_gradient(self) -> None:
        """Wait until `grad` is where the optimizer reads it."""
        if self.crossing is not None:
            self.crossing.settle()

    def consume_gradient(self) -> None:
        """The gradient is used up: without an owner between backwards, it loses its memory."""
        self.has_grad = False
        if not self._consumed:
            return
        if self._grad_in_twin:
            self.twin.release()
        elif self.crossing is None:
            self.grad.untyped_storage().resize_(0)

    def clear_gradient(self) -> None:
        """Forget all gradients; buffers stay where they are persistent."""
        self.consume_gradient()
        self.twin.forget()

    # ------------------------------------------------------------------ optimizer

    def _cut_for_optimizer(self) -> list[OptimizerPiece]:
        """One optimizer parameter per range of `optimizer_ranges`."""
        limit = self._homes.offload.piece_numel if self.states == "nvme" else None
        source = self.shard if self.master is None else self.master
        return [
            OptimizerPiece(group, nn.Parameter(source[start:stop]), start, stop)
            for group, start, stop in optimizer_ranges(
                self.specs, self.layout, self.group.rank, limit
            )
        ]

    @torch.no_grad()
    def move_states(self, states: Tier, optimizer: torch.optim.Optimizer) -> None:
        """Let weights and states of the optimizer live on the device, or on the host, from now on.

        They keep their bits. Only while there is no gradient.
        """
        assert not self.has_grad
        weights = None if states == self.states else self._move_weights(states)
        if weights is None:
            return
        self._allocate_gradients()
        for piece in self.optimizer_pieces:
            piece.weights.data = weights[piece.start : piece.stop]
            state = optimizer.state.get(piece.weights, {})
            if state:
                group = optimizer.param_groups[piece.group_index]
                places = devices_of_state(optimizer, group, weights)
                for key, value in state.items():
                    if isinstance(value, torch.Tensor):
                        state[key] = value.to(places.get(key, weights.device))

    def piece_at(self, offset: int) -> OptimizerPiece:
        """The optimizer piece that has the element at `offset` of the shard."""
        for piece in self.optimizer_pieces:
            if piece.start <= offset < piece.stop:
                return piece
        raise ShardError(f"{self.name}: element {offset} of its shard is not trained")

    def parts_of(self, piece: OptimizerPiece) -> list[Piece]:
        """The parts of parameters that an optimizer piece consists of."""
        parts = self.layout.pieces(self.group.rank)
        return [part for part in parts if piece.start <= part.offset < piece.stop]

    def holdings(self) -> Iterator[Holding]:
        """This rank's buffers that outlive a step; the optimizer's own state excluded."""
        numel, own, padding = self.layout.numel, self.layout.shard_numel, self.layout.padding
        gap = own - sum(p.stop - p.start for p in self.layout.pieces(self.group.rank))
        near, size = self._homes.near, self.dtype.itemsize
        if self.stage == 3:
            place: Place = near
            if self.shard_home is not None:
                place = "host" if isinstance(self.shard_home, HostShard) else "disk"
            yield Holding(place, "parameters", own * size, gap * size)
        else:
            yield Holding(near, "parameters", numel * size, padding * size)
        size = self.grad_dtype.itemsize
        if self.crossing is not None:
            yield Holding("host", "gradients", own * size, gap * size)
            yield Holding("host", "buffers", self.crossing.addend_bytes)
        elif self.trainable and not self._consumed:
            whole = self._grad_in_twin
            yield Holding(
                near,
                "gradients",
                (numel if whole else own) * size,
                (padding if whole else gap) * size,
            )
        if self._outgoing is not None and not isinstance(self.shard_home, HostShard):
            yield Holding("host", "buffers", self._outgoing.nbytes)
        if self.master is not None and self.states != "nvme":
            size = self.master.element_size()
            yield Holding(
                near if self.crossing is None else "host", "master", own * size, gap * size
            )

    def gap_of(self, piece: OptimizerPiece) -> int:
        """Elements of an optimizer piece that belong to no parameter."""
        return piece.stop - piece.start - sum(p.stop - p.start for p in self.parts_of(piece))

    @property
    def states_place(self) -> Place:
        """Where the optimizer's states are between steps."""
        if self.states == "nvme":
            return "disk"
        return self._homes.near if self.states == "device" else "host"


def _nothing(unit: Unit) -> None:
    """Nobody waits for its gradients."""
