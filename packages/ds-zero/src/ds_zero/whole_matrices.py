"""Updating whole matrices of which every rank holds a part: an owner puts each together.

A step of an optimizer such as Muon, per group of ranks:

1. every rank turns its parts of gradients into directions, elementwise;
2. one exchange brings each matrix's direction together on its owner;
3. each owner computes the updates of its matrices; owners are chosen so that all have about the
   same number of FLOPs to do;
4. the reverse exchange brings the parts of the updates back, and they are applied, elementwise.

With P elements of matrices in directions of d bytes over N ranks, each rank sends about
`2 d P (N-1) / N^2` bytes a step, and holds `4 d P / N` more meanwhile. No rank computes what
another does, and every update is computed as one rank alone would, so its bits are the same.

A rank that an error stops still takes part in the exchanges, or the others would wait for it in
vain. When they are over the ranks agree whether all went well, and else all end with the cause.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from ds_core import comm
from ds_core.flat import Piece, Slot
from ds_core.whole_matrices import WholeMatrices
from ds_zero.inner_step import split_by_parameter
from ds_zero.unit import Unit
from ds_zero.wholeness import Attempts


@dataclass(frozen=True)
class _Matrix:
    """A matrix, where it lies, and who puts it together.

    Attributes:
        unit: whose flat buffers hold it.
        position: among the parameters of the unit.
        group_index: which of the optimizer's groups it belongs to.
        slot: its place in the flat buffer.
        parts: for each rank of the unit's group, the range of the matrix that it holds.
        owner: rank that computes its update.
    """

    unit: Unit
    position: int
    group_index: int
    slot: Slot
    parts: tuple[tuple[int, int], ...]
    owner: int

    def size(self, rank: int) -> int:
        """Elements that a rank holds."""
        start, stop = self.parts[rank]
        return stop - start


class MatrixStep:
    """Updates the matrices of some units that share a group of ranks.

    Args:
        optimizer: whose groups hold flat shards.
        units: trained units of one group of ranks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, units: Iterable[Unit]) -> None:
        self._inner = optimizer
        self._optimizer: WholeMatrices = optimizer  # type: ignore[assignment]
        units = list(units)
        self.group = units[0].group
        self._matrices = self._shared_out(units)

    def _shared_out(self, units: list[Unit]) -> list[_Matrix]:
        """All matrices with their owners: the costliest first, each to whoever has least to do."""
        found: list[tuple[int, Unit, int, int, Slot]] = []
        for unit in units:
            for position, (spec, slot) in enumerate(
                zip(unit.specs, unit.layout.slots, strict=True)
            ):
                assert spec.group_index is not None
                group = self._inner.param_groups[spec.group_index]
                if self._optimizer.is_whole(group):
                    cost = self._optimizer.matrix_flops(group, slot.shape)
                    found.append((cost, unit, position, spec.group_index, slot))
        load = [0] * self.group.size
        owners: dict[int, int] = {}
        for index in sorted(range(len(found)), key=lambda index: -found[index][0]):
            owners[index] = load.index(min(load))
            load[owners[index]] += found[index][0]
        return [
            _Matrix(unit, position, group_index, slot, _parts(unit, slot), owners[index])
            for index, (_, unit, position, group_index, slot) in enumerate(found)
        ]

    def run(
        self, used: dict[int, list[bool]], grad_scale: float | torch.Tensor, attempts: Attempts
    ) -> None:
        """Update every matrix that some rank used, in the master and in the shard. Collective.

        attempts: to do this rank's part; after an error it sends zeros, and updates nothing.
        """
        matrices = [m for m in self._matrices if used[m.unit.index][m.position]]
        # Order of everything that is sent: by owner, and the matrices of one in their order.
        matrices.sort(key=lambda m: m.owner)
        for unit in {m.unit.index: m.unit for m in self._matrices}.values():
            if not all(used[unit.index]):
                attempts.attempt(partial(split_by_parameter, self._inner, unit))
        if not matrices:
            return
        directions = attempts.attempt(partial(self._directions, matrices, grad_scale))
        if directions is None:
            directions = [self._zeros(m.size(self.group.rank)) for m in matrices]
        updates = self._exchanged(matrices, directions, attempts)
        for matrix, update in zip(matrices, updates, strict=True):
            if update.numel():
                attempts.attempt(partial(self._apply, matrix, update))

    # ------------------------------------------------------------------ elementwise

    def _directions(
        self, matrices: list[_Matrix], grad_scale: float | torch.Tensor
    ) -> list[torch.Tensor]:
        """This rank's part of each matrix's direction; some are empty."""
        pieces: dict[int, torch.Tensor] = {}
        found = []
        for matrix in matrices:
            part, unit = self._part(matrix), matrix.unit
            if part is None:
                found.append(self._zeros(0))
                continue
            piece = unit.piece_at(part.offset)
            group = self._inner.param_groups[piece.group_index]
            if id(piece) not in pieces:
                grad = unit.grad[piece.start : piece.stop]
                with unit.stepping(piece, self._inner):
                    made = self._optimizer.direction(group, piece.weights, grad, grad_scale)
                # Matrices are put together and updated where the model computes.
                pieces[id(piece)] = made.to(unit.full.device)
            start = part.offset - piece.start
            found.append(pieces[id(piece)][start : start + part.stop - part.start])
        return found

    def _zeros(self, numel: int) -> torch.Tensor:
        like = self._matrices[0].unit.full
        return like.new_zeros(numel, dtype=self._optimizer.direction_dtype)

    def _apply(self, matrix: _Matrix, update: torch.Tensor) -> None:
        unit, part = matrix.unit, self._part(matrix)
        assert part is not None
        group = self._inner.param_groups[matrix.group_index]
        own = slice(part.offset, part.offset + part.stop - part.start)
        piece = unit.piece_at(part.offset)
        with unit.updating(whole=False) as rounded, unit.present(piece, edits=True):
            weights = unit.weights_of(piece, own.start, own.stop)
            self._optimizer.apply_update(
                group, weights, update.to(weights.device), matrix.slot.shape
            )
            if rounded is not None:
                rounded[own].copy_(weights)

    def _part(self, matrix: _Matrix) -> Piece | None:
        for piece in matrix.unit.layout.pieces(self.group.rank):
            if piece.slot == matrix.slot:
                return piece
        return None

    # ------------------------------------------------------------------ together and apart

    def _exchanged(
        self, matrices: list[_Matrix], directions: list[torch.Tensor], attempts: Attempts
    ) -> list[torch.Tensor]:
        """This rank's part of each matrix's update."""
        rank, ranks = self.group.rank, range(self.group.size)
        own = [m for m in matrices if m.owner == rank]
        here = torch.cat(directions)
        to_owners = [sum(m.size(rank) for m in matrices if m.owner == r) for r in ranks]
        from_ranks = [sum(m.size(r) for m in own) for r in ranks]
        gathered = here.new_empty(sum(from_ranks))
        comm.all_to_all_uneven(
            gathered,
            here,
            self.group,
            recv_sizes=from_ranks,
            send_sizes=to_owners,
            caller="directions of matrices",
        )
        # By rank, and the matrices of each in order.
        pieces = iter(gathered.split([m.size(r) for r in ranks for m in own]))
        by_rank = [[next(pieces) for _ in own] for _ in ranks]
        for index, matrix in enumerate(own):
            parts = [by_rank[r][index] for r in ranks]
            attempts.attempt(partial(self._update_whole, matrix, parts))
        comm.all_to_all_uneven(
            here,
            gathered,
            self.group,
            recv_sizes=to_owners,
            send_sizes=from_ranks,
            caller="updates of matrices",
        )
        return list(here.split([m.size(rank) for m in matrices]))

    def _update_whole(self, matrix: _Matrix, parts: list[torch.Tensor]) -> None:
        """Replace the ranks' parts of a matrix's direction by those of its update."""
        group = self._inner.param_groups[matrix.group_index]
        whole = torch.cat(parts).view(matrix.slot.shape)
        update = self._optimizer.whole_update(group, whole).reshape(-1)
        for part, (start, stop) in zip(parts, matrix.parts, strict=True):
            part.copy_(update[start:stop])


def _parts(unit: Unit, slot: Slot) -> tuple[tuple[int, int], ...]:
    """The range of a slot that each rank of the unit's group holds."""
    size = unit.layout.shard_numel
    found = []
    for rank in range(unit.group.size):
        low, high = rank * size - slot.offset, (rank + 1) * size - slot.offset
        start = min(max(low, 0), slot.numel)
        found.append((start, max(start, min(high, slot.numel))))
    return tuple(found)


class MatrixSteps:
    """Updates all whole matrices of some units, by their groups of ranks.

    Args:
        optimizer: whose groups hold flat shards; any, also one without whole matrices.
        units: trained units.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, units: Iterable[Unit]) -> None:
        by_group: dict[int, list[Unit]] = {}
        for unit in units if isinstance(optimizer, WholeMatrices) else ():
            by_group.setdefault(id(unit.group), []).append(unit)
        #: One for every group of ranks; none for an optimizer that needs no whole matrix.
        self.of_groups = [MatrixStep(optimizer, members) for members in by_group.values()]

    @torch.no_grad()
    def run(self, used: dict[int, list[bool]], grad_scale: float | torch.Tensor) -> None:
        """Update every matrix that some rank used. Collective.

        An error on one rank ends on all that share matrices with it: ShardError tells the others.
        """
        if not self.of_groups:
            return
        attempts = Attempts()
        for step in self.of_groups:
            step.run(used, grad_scale, attempts)
        attempts.end_together("step", [step.group for step in self.of_groups])
