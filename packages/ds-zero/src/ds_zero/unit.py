"""One unit: the flat buffers of parameters that travel together, and who owns which part.

Per unit of `numel` elements over N ranks (bytes per element: p of the parameters, g of gradients):

| buffer    | what it holds                                   | stage 1  | stage 2  | stage 3    |
|-----------|-------------------------------------------------|----------|----------|------------|
| `full`    | all parameters; the model's are views of it     | p numel  | p numel  | transient  |
| `shard`   | this rank's 1/N of them                         | in full  | in full  | p numel/N  |
| `twin`    | local gradients, each written once by autograd  | g numel  | transient| transient  |
| `grad`    | this rank's 1/N of the averaged gradient        | in twin  | g numel/N| g numel/N  |
| `master`  | this rank's 1/N of the fp32 copy, if any         | 4 numel/N| 4 numel/N| 4 numel/N  |

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", section 5; the flat layout is ours (docs/design.md, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ds_core import comm
from ds_core.flat import FlatLayout, Piece
from ds_core.flat_gradient import FlatGradient
from ds_core.precision import Precision
from ds_core.seams import Transport
from ds_zero.plan import UnitSpec
from ds_zero.sharded_param import Keeper, hide, show

#: Slots and shards start at multiples of this many bytes, so that vector units find them aligned.
ALIGN_BYTES = 64


@dataclass(frozen=True)
class OptimizerPiece:
    """The part of a unit's shard that one optimizer group updates.

    Attributes:
        group_index: which of the optimizer's parameter groups.
        weights: the optimizer's own parameter: a view of `master` or `shard`.
        start, stop: its range in the shard.
        name: the model's parameter that it is a part of, if it is a part of only one.
    """

    group_index: int
    weights: nn.Parameter
    start: int
    stop: int
    name: str | None = None


def unit_layout(spec: UnitSpec, dtype: torch.dtype, num_shards: int) -> FlatLayout:
    """Where the parameters of a unit lie in its flat buffer of `dtype`, cut into `num_shards`."""
    return FlatLayout.pack(
        [(s.name, tuple(s.param.shape)) for s in spec.params],
        num_shards=num_shards,
        align=max(1, ALIGN_BYTES // dtype.itemsize),
    )


class Unit:
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
    ) -> None:
        self.index, self.name, self.group = index, spec.name, group
        self._reduce_group = reduce_group or group
        self._wire = transport
        self.modules, self.is_root, self.trainable = spec.modules, spec.is_root, spec.trainable
        self.is_tile = spec.is_tile
        self.specs = spec.params
        self.params = [s.param for s in spec.params]
        # With one rank there is nothing to gather: stage 3 keeps the parameters where they are.
        self.stage = stage if group.size > 1 else min(stage, 2)
        floating = spec.dtype.is_floating_point
        self.dtype = (precision.compute if floating else None) or spec.dtype
        self.layout = unit_layout(spec, self.dtype, group.size)
        self._fill(values, precision, broadcast)
        self.grad_dtype = precision.grad or self.dtype
        # Stage 1 keeps full-size gradients anyway: this rank's part of the average is among them.
        self._grad_in_twin = self.stage == 1 and self.trainable and self.grad_dtype == self.dtype
        self.grad = torch.empty(0)
        self.optimizer_pieces: list[OptimizerPiece] = []
        if self.trainable:
            self._allocate_gradients()
            self.optimizer_pieces = self._cut_for_optimizer()
        #: Whether `grad` holds something that the next reduction must be added to.
        self.has_grad = False

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
        self.full = staging.to(self.dtype)
        self.shard = own.to(self.dtype, copy=True) if self.stage == 3 else self._own(self.full)
        self._views = [
            self.full[slot.offset : slot.end].view(slot.shape) for slot in self.layout.slots
        ]
        for param, view in zip(self.params, self._views, strict=True):
            show(param, view)

    def _own(self, flat: torch.Tensor) -> torch.Tensor:
        size = self.layout.shard_numel
        return flat[self.group.rank * size : (self.group.rank + 1) * size]

    @property
    def weights(self) -> torch.Tensor:
        """What the optimizer updates: the fp32 master shard, or the shard itself."""
        return self.shard if self.master is None else self.master

    @property
    def is_full(self) -> bool:
        """Whether the full parameters are present on this rank."""
        return self.full.untyped_storage().size() > 0

    def start_gather(self) -> comm.Pending:
        """Allocate the full parameters and start filling them. Collective over the group."""
        if not self.is_full:
            self.full.untyped_storage().resize_(self.full.numel() * self.full.element_size())
        return self._wire.all_gather(self.full, self.shard, self.group, caller=self.name)

    def show(self) -> None:
        """Give the parameters their gathered values."""
        for param, view in zip(self.params, self._views, strict=True):
            show(param, view)

    def free(self, keeper: Keeper) -> None:
        """Drop the full parameters; tensors that autograd saved see them again once regathered."""
        for param in self.params:
            hide(param, keeper)
        self.full.untyped_storage().resize_(0)

    def publish(self, *, cast: bool = True) -> comm.Pending | None:
        """Make updated weights visible: cast the master shard; at stages 1 and 2, start gathering.

        `cast` is false if the optimizer wrote the low-precision shard itself. Collective over the
        group where the full parameters are present.
        """
        if self.master is not None and cast:
            self.shard.copy_(self.master)
        if self.stage < 3 or self.is_full:
            return self.start_gather()
        return None

    def adopt_full(self) -> None:
        """Take this rank's share over from the full parameters, which were edited."""
        own = self._own(self.full)
        self.weights.copy_(own)
        if self.stage == 3:
            self.shard.copy_(own)

    # ------------------------------------------------------------------ gradients

    def _allocate_gradients(self) -> None:
        device = self.full.device
        self.twin = FlatGradient(self.layout, self.dtype, device, transient=not self._grad_in_twin)
        if self._grad_in_twin:
            self.grad = self._own(self.twin.flat)
        else:
            self.grad = torch.zeros(self.layout.shard_numel, dtype=self.grad_dtype, device=device)

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
        return self._wire.reduce_scatter(
            self.grad,
            self.twin.complete(),
            self._reduce_group,
            accumulate=self.has_grad,
            caller=self.name,
        )

    def finish_reduce(self) -> None:
        """The reduction is complete: the twin is no longer needed (stage 1 keeps its memory)."""
        self.has_grad = True
        self.twin.release()

    def clear_gradient(self) -> None:
        """Forget all gradients; buffers stay where they are persistent."""
        self.has_grad = False
        self.twin.forget()

    # ------------------------------------------------------------------ optimizer

    def _cut_for_optimizer(self) -> list[OptimizerPiece]:
        """One optimizer parameter per group whose slots reach into this rank's shard."""
        ranges: dict[int, tuple[int, int]] = {}
        groups = {s.name: s.group_index for s in self.specs}
        for piece in self.layout.pieces(self.group.rank):
            group = groups[piece.slot.name]
            assert group is not None
            start, stop = piece.offset, piece.offset + piece.stop - piece.start
            first, _ = ranges.get(group, (start, stop))
            ranges[group] = (first, stop)
        return [
            OptimizerPiece(group, nn.Parameter(self.weights[start:stop]), start, stop)
            for group, (start, stop) in ranges.items()
        ]

    def parts_of(self, piece: OptimizerPiece) -> list[Piece]:
        """The parts of parameters that an optimizer piece consists of."""
        parts = self.layout.pieces(self.group.rank)
        return [part for part in parts if piece.start <= part.offset < piece.stop]

    def persistent_bytes(self) -> dict[str, int]:
        """Bytes of this rank's buffers that outlive a step, by kind (optimizer state excluded)."""
        numel, own = self.layout.numel, self.layout.shard_numel
        kinds = {"parameters": (own if self.stage == 3 else numel) * self.dtype.itemsize}
        if self.trainable:
            kinds["gradients"] = (numel if self._grad_in_twin else own) * self.grad_dtype.itemsize
        if self.master is not None:
            kinds["master"] = own * self.master.element_size()
        return kinds

    def padding_bytes(self) -> int:
        """Bytes of the persistent buffers that belong to no parameter, over this rank's share."""
        own, used = self.layout.shard_numel, 0
        for piece in self.layout.pieces(self.group.rank):
            used += piece.stop - piece.start
        full = self.layout.padding
        total = (own - used if self.stage == 3 else full) * self.dtype.itemsize
        if self.trainable:
            total += (full if self._grad_in_twin else own - used) * self.grad_dtype.itemsize
        if self.master is not None:
            total += (own - used) * self.master.element_size()
        return total
