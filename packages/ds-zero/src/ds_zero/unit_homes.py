"""Where the parts of a unit live between their uses, and how they come and go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

from ds_core.flat import FlatLayout
from ds_core.optimizer_state import is_wide
from ds_zero.offload.choice import Tier
from ds_zero.offload.crossing import Crossing, host_empty
from ds_zero.offload.homes import Homes
from ds_zero.offload.shard_home import DiskShard, HostShard, ShardHome, memory_of
from ds_zero.unit_piece import OptimizerPiece


class UnitHomes:
    """The part of a `Unit` that knows where its shard, its weights and their states are.

    What steps, saves or edits a unit asks for them through the context managers here, and need not
    know itself. It uses these buffers of the unit, and knows nothing of gradients and gathers.
    """

    stage: int
    dtype: torch.dtype
    grad_dtype: torch.dtype
    layout: FlatLayout
    states: Tier
    full: torch.Tensor
    shard: torch.Tensor
    master: torch.Tensor | None
    crossing: Crossing | None
    shard_home: ShardHome | None
    optimizer_pieces: list[OptimizerPiece]
    #: Optimizer pieces on disk whose states are there, but have not seen a step: elsewhere an
    #: optimizer has none before its first.
    unstepped: set[torch.Tensor]
    _homes: Homes

    def _find_homes(self) -> None:
        """Let the shard live elsewhere, if that is asked for, until the unit is whole."""
        if self.stage == 3:
            self.shard_home = self._homes.shard_home(self.shard)
        self._find_outgoing()

    def _find_outgoing(self) -> None:
        #: Where the step of an optimizer on the host leaves what goes to the shard.
        self._outgoing: torch.Tensor | None = None
        if self.crossing is None or self.master is None:
            return
        if isinstance(self.shard_home, HostShard):
            self._outgoing = self.shard_home.host
        elif self.master.dtype != self.dtype or self.states == "nvme":
            pin = self._homes.offload.pin_memory
            self._outgoing = host_empty(self.shard.numel(), self.dtype, pin=pin)
            self._outgoing.copy_(self.master)

    @property
    def rounds(self) -> bool:
        """Whether an update leaves rounded weights beside those of the optimizer."""
        return self.master is not None and (self.crossing is None or self._outgoing is not None)

    @contextmanager
    def updating(self, *, whole: bool) -> Iterator[torch.Tensor | None]:
        """Around an update of the weights: afterwards the shard has them, wherever it lives.

        Yields where to leave the rounded weights, `[shard_numel]` on the optimizer's device; None
        if the optimizer updates the shard itself. Unless all of it is to be written (`whole`), it
        has its present values.
        """
        comes = self.shard_home is not None and self.crossing is None
        if comes:
            self._bring_shard(fill=self.master is None or not whole)
        if self.master is None:
            yield None
        else:
            yield self.shard if self.crossing is None else self._outgoing
        if self.crossing is not None:
            source = self.master if self._outgoing is None else self._outgoing
            assert source is not None
            if self.shard_home is None:
                self.crossing.send_weights(self.shard, source)
            else:
                self.shard_home.store(source)
        elif self.shard_home is not None:
            self.shard_home.store(self.shard)
            self._leave_shard()

    @property
    def shown(self) -> torch.Tensor | ShardHome:
        """The shard that the model computes with, where an update leaves it."""
        if self._outgoing is not None:
            return self._outgoing
        return self.shard if self.shard_home is None else self.shard_home

    @property
    def _shard_is_here(self) -> bool:
        return self.shard.untyped_storage().size() > 0

    def _bring_shard(self, *, fill: bool) -> None:
        """Give a shard that lives elsewhere its memory, and its values."""
        self.shard.untyped_storage().resize_(self.shard.nbytes)
        if not fill:
            return
        assert self.shard_home is not None
        try:
            self.shard_home.fetch_into(self.shard)
        except BaseException:
            self.shard.untyped_storage().resize_(0)  # or what it holds would pass for values
            raise

    def _leave_shard(self) -> None:
        """Take the memory of a shard that lives elsewhere, unless a gather may still read it."""
        if self.shard_home is not None and not self.is_full:
            self.shard.untyped_storage().resize_(0)

    def shard_memory(self) -> AbstractContextManager[None]:
        """The shard has memory inside the block, so that views of it can be made."""
        return nullcontext() if self._shard_is_here else memory_of(self.shard)

    @contextmanager
    def present(
        self, piece: OptimizerPiece | None, *, edits: bool, weights: bool = True
    ) -> Iterator[None]:
        """States and `weights` of an optimizer piece are in memory inside the block; `edits` stay.

        None: those of frozen parameters. Without `weights`, a shard that gathers read meanwhile is
        left alone, so that a checkpoint may be written beside training.
        """
        swap = self._homes.swap
        with ExitStack() as stack:
            if piece is not None and swap is not None:
                stack.enter_context(swap.present(piece.weights, edits=edits))
            away = self.shard_home is not None and not self._shard_is_here
            if weights and self.master is None and away:
                self._bring_shard(fill=True)
                stack.callback(self._leave_shard)
                assert self.shard_home is not None
                if edits:
                    stack.callback(self.shard_home.store, self.shard)
            yield

    @contextmanager
    def stepping(self, piece: OptimizerPiece, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """States and weights of an optimizer piece are in memory inside the block, for a step."""
        with self.present(piece, edits=True):
            group = optimizer.param_groups[piece.group_index]
            # Others begin from zeros, so they need no second memory.
            differs = piece.weights in self.unstepped and group.get("dampening")
            with _first_step(optimizer, piece.weights) if differs else nullcontext():
                yield
        self.unstepped.discard(piece.weights)

    def put_on_disk(self, piece: OptimizerPiece, optimizer: torch.optim.Optimizer) -> None:
        """Give a piece's states, which are in memory, to the disk, if that is where they live."""
        swap = self._homes.swap
        if self.states != "nvme" or swap is None:
            return
        has_master = self.master is not None

        def tensors() -> dict[str, torch.Tensor]:
            state = optimizer.state[piece.weights].items()
            found = {key: value for key, value in state if is_wide(value)}
            return {"weights": piece.weights, **found} if has_master else found

        swap.adopt(piece.weights, tensors)

    def rescue_shard(self) -> None:
        """Before a load: the shard is where it lives, whatever an error has left of an update."""
        if isinstance(self.shard_home, DiskShard):
            self.shard_home.rescue()
        self._leave_shard()

    def take_from_disk(self, piece: OptimizerPiece, *, rescues: bool = False) -> None:
        """Give a piece's states memory of their own, to be laid out anew.

        rescues: also where they could not be written.
        """
        swap = self._homes.swap
        if swap is not None and piece.weights in swap:
            swap.release(piece.weights, rescues=rescues)

    def drop_master(self) -> None:
        """The pieces have taken the master weights over: the flat copy has no memory any more."""
        if self.states == "nvme" and self.master is not None:
            self.master.untyped_storage().resize_(0)

    @torch.no_grad()
    def separate_weights(self) -> None:
        """Give the optimizer weights of its own, which may be ahead of what the model sees."""
        if self.master is None:
            with self.present(None, edits=False):
                self.master = self.shard.clone()
            for piece in self.optimizer_pieces:
                piece.weights.data = self.master[piece.start : piece.stop]
        elif self.crossing is not None and self._outgoing is None:
            pin = self._homes.offload.pin_memory
            self._outgoing = host_empty(self.shard.numel(), self.dtype, pin=pin)
            self._outgoing.copy_(self.master)

    def _move_weights(self, states: Tier) -> torch.Tensor | None:
        """Let weights of the optimizer live on the device, or on the host, from now on.

        They keep their bits. Returns them, None if all was in one memory.
        """
        before, own = self.crossing, self.layout.shard_numel
        self.states = states
        self.crossing = self._homes.crossing(states, own, self.grad_dtype)
        if before is None and self.crossing is None:
            return None
        source = self.shard if self.master is None else self.master
        if self.crossing is not None:
            weights = host_empty(own, source.dtype, pin=self._homes.offload.pin_memory)
            with self.present(None, edits=False):
                weights.copy_(source)
            self.master = weights
        elif source.dtype != self.dtype:
            weights = self.master = source.to(self.full.device, copy=True)
        else:
            weights, self.master = self.shard, None  # which has the same bits
        self._find_outgoing()
        return weights

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the shard the rounded values of master weights that were edited or loaded."""
        if self.master is None:
            return
        with self.updating(whole=True) as rounded:
            for piece in self.optimizer_pieces if rounded is not None else ():
                assert rounded is not None
                with self.present(piece, edits=False):
                    rounded[piece.start : piece.stop].copy_(piece.weights)

    def weights_of(self, piece: OptimizerPiece | None, start: int, stop: int) -> torch.Tensor:
        """The most precise weights of a range of the shard, within one piece; a view."""
        if piece is None or self.master is None:
            return self.shard[start:stop]
        return piece.weights.detach()[start - piece.start : stop - piece.start]

    def is_away(self, kind: str) -> bool:
        """Whether weights ("parameter") or states have memory only while they are used."""
        if kind == "gradient":
            return False
        if kind == "parameter" and self.master is None:
            return self.shard_home is not None
        return self.states == "nvme"

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the most precise weights."""
        return self.dtype if self.master is None else self.master.dtype

    @property
    def is_full(self) -> bool:
        """Whether the full parameters are present on this rank."""
        return self.full.untyped_storage().size() > 0


@contextmanager
def _first_step(optimizer: torch.optim.Optimizer, weights: torch.Tensor) -> Iterator[None]:
    """Inside, an optimizer finds no state of a parameter; what it makes goes to the present one."""
    held = optimizer.state.pop(weights)
    try:
        yield
        for key, value in optimizer.state.get(weights, {}).items():
            if is_wide(value):
                held[key].copy_(value)
            else:
                held[key] = value
    finally:
        optimizer.state[weights] = held
