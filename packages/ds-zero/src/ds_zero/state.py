"""Reading, writing, saving and counting what a `ZeroOptimizer` holds, by parameter name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ds_core import comm
from ds_core.flat import Piece
from ds_core.optimizer_state import PortableState, allocate_state_of, is_wide, state_of
from ds_zero.errors import ShardError
from ds_zero.holdings import Holding, Place, by_place, in_memory
from ds_zero.inner_step import split_by_parameter
from ds_zero.offload.shard_home import DiskShard, HostShard
from ds_zero.unit import Unit
from ds_zero.unit_piece import OptimizerPiece

if TYPE_CHECKING:
    from ds_zero.held_values import HeldValues


def _find(optimizer: HeldValues, which: str | nn.Parameter) -> tuple[Unit, int]:
    for unit in optimizer.units:
        for position, spec in enumerate(unit.specs):
            if which is spec.param or (isinstance(which, str) and which == spec.name):
                return unit, position
    names = [spec.name for unit in optimizer.units for spec in unit.specs]
    told = f"{which!r}" if isinstance(which, str) else f"of shape {list(which.shape)}"
    raise ShardError(
        f"parameter {told} is not one of the {len(names)} of the sharded model; the first of them "
        f"are {', '.join(names[:4])}"
    )


def _piece_of(unit: Unit, position: int) -> Piece | None:
    slot = unit.layout.slots[position]
    for piece in unit.layout.pieces(unit.group.rank):
        if piece.slot == slot:
            return piece
    return None


def _optimizer_piece(unit: Unit, piece: Piece) -> OptimizerPiece:
    if not unit.trainable:
        raise ShardError(f"{piece.slot.name!r} is frozen: it has no optimizer state")
    return unit.piece_at(piece.offset)


@contextmanager
def _held(
    optimizer: HeldValues, unit: Unit, piece: Piece | None, kind: str, *, edits: bool
) -> Iterator[torch.Tensor]:
    """`_local` of what may live elsewhere; `edits` made inside the block are kept."""
    if piece is None or kind == "gradient":
        unit.settle_gradient()
        yield _local(optimizer, unit, piece, kind)
        return
    mine = unit.piece_at(piece.offset) if unit.trainable else None
    with unit.present(mine, edits=edits, weights=kind == "parameter"):
        yield _local(optimizer, unit, piece, kind)


def _local(optimizer: HeldValues, unit: Unit, piece: Piece | None, kind: str) -> torch.Tensor:
    """This rank's elements of a parameter, gradient or state: a 1-D view, maybe empty."""
    if piece is None:
        return unit.full.new_empty(0, dtype=unit.weights_dtype)
    start, stop = piece.offset, piece.offset + piece.stop - piece.start
    if kind == "parameter":
        owner = unit.piece_at(start) if unit.trainable else None
        return unit.weights_of(owner, start, stop)
    if kind == "gradient":
        return unit.grad[start:stop]
    mine = _optimizer_piece(unit, piece)
    held = state_of(optimizer._inner, mine.weights)
    value = held.get(kind)
    if isinstance(value, torch.Tensor) and value.shape == mine.weights.shape:
        return value[start - mine.start : stop - mine.start]
    each = [state_of(optimizer._inner, weights) for weights in optimizer.state]
    keys = {k for values in each for k, v in values.items() if is_wide(v)}
    if kind in keys and not held:
        # No step has used the parameter yet.
        return torch.zeros_like(mine.weights.detach()[start - mine.start : stop - mine.start])
    raise ShardError(
        f"optimizer state {kind!r}: {type(optimizer._inner).__name__} has "
        f"{', '.join(sorted(keys)) or 'no state before its first step'}"
    )


def local_value(optimizer: HeldValues, which: str | nn.Parameter, kind: str) -> torch.Tensor:
    """See `ZeroOptimizer.local_value`."""
    unit, position = _find(optimizer, which)
    with _held(optimizer, unit, _piece_of(unit, position), kind, edits=False) as value:
        return value.clone() if unit.is_away(kind) else value


def local_shard(unit: Unit, position: int) -> torch.Tensor:
    """This rank's elements of a parameter of stage 3, as the model has them."""
    piece = _piece_of(unit, position)
    if piece is None:
        return unit.shard.new_empty(0)
    start, stop = piece.offset, piece.offset + _numel(piece)
    home = unit.shard_home
    if isinstance(home, HostShard):
        return home.host[start:stop].clone()
    if isinstance(home, DiskShard):
        return home.read(start, stop)
    return unit.shard[start:stop]


def full_value(optimizer: HeldValues, which: str | nn.Parameter, kind: str) -> torch.Tensor:
    """A parameter, gradient or state of any rank's share, whole, on every rank. Collective."""
    unit, position = _find(optimizer, which)
    slot = unit.layout.slots[position]
    piece = _piece_of(unit, position)
    mine = _copied_or_error(optimizer, unit, piece, kind)
    dtype = unit.grad_dtype if kind == "gradient" else unit.weights_dtype
    own = torch.zeros(unit.layout.shard_numel, dtype=dtype, device=unit.shard.device)
    if piece is not None:
        own[piece.offset : piece.offset + mine.numel()].copy_(mine)
    whole = torch.empty(unit.layout.numel, dtype=dtype, device=own.device)
    comm.all_gather(whole, own, unit.group, caller=f"{kind} of {slot.name}")
    return whole[slot.offset : slot.end].view(slot.shape).clone()


def _copied_or_error(
    optimizer: HeldValues, unit: Unit, piece: Piece | None, kind: str
) -> torch.Tensor:
    """As `local_value`, but errors are raised on all ranks, also where there is no part to miss."""
    mine, complaint = unit.full.new_empty(0), None
    try:
        with _held(optimizer, unit, piece, kind, edits=False) as value:
            mine = value.clone() if unit.is_away(kind) else value
    except ShardError as error:
        complaint = str(error)
    if kind not in ("parameter", "gradient"):
        complaints = comm.all_gather_object(complaint, unit.group, caller=f"{kind} of {unit.name}")
        for text in filter(None, complaints):
            raise ShardError(text)
    elif complaint is not None:
        raise ShardError(complaint)
    return mine


def full_value_or_none(
    optimizer: HeldValues, which: str | nn.Parameter, kind: str
) -> torch.Tensor | None:
    """As `full_value`, but None for a gradient that does not exist."""
    unit, _ = _find(optimizer, which)
    if kind == "gradient" and not (unit.trainable and unit.has_grad):
        return None
    return full_value(optimizer, which, kind)


def refuse_gradient(operation: str) -> NoReturn:
    """Raise the ShardError of a gradient that cannot be set."""
    raise ShardError(
        f"{operation}: with update_in_backward a gradient is used up when backward ends; shard "
        f"without it"
    )


def set_local_value(
    optimizer: HeldValues, which: str | nn.Parameter, kind: str, value: torch.Tensor
) -> None:
    """See `ZeroOptimizer.set_local_value`."""
    unit, position = _find(optimizer, which)
    piece = _piece_of(unit, position)
    size = 0 if piece is None else _numel(piece)
    if value.numel() != size:
        raise ShardError(
            f"{kind} of {unit.layout.slots[position].name!r}: got {value.numel()} numbers, this "
            f"rank holds {size}"
        )
    _write(optimizer, unit, position, kind, value.reshape(-1))
    if kind == "parameter":
        unit.refresh()


def set_full_value(
    optimizer: HeldValues, which: str | nn.Parameter, kind: str, value: torch.Tensor
) -> None:
    """Overwrite a parameter, gradient or state; every rank keeps its share of `value`."""
    unit, position = _find(optimizer, which)
    slot = unit.layout.slots[position]
    if tuple(value.shape) != slot.shape:
        raise ShardError(
            f"{kind} of {slot.name!r}: got shape {list(value.shape)}, expected {list(slot.shape)}"
        )
    piece = _piece_of(unit, position)
    own = slice(0, 0) if piece is None else slice(piece.start, piece.stop)
    _write(optimizer, unit, position, kind, value.reshape(-1)[own])
    if kind == "parameter":
        unit.refresh()
        pending = unit.publish()
        if pending is not None:
            pending.wait()


def _write(optimizer: HeldValues, unit: Unit, position: int, kind: str, part: torch.Tensor) -> None:
    """Overwrite this rank's part of a parameter, gradient or state, wherever it is."""
    piece = _piece_of(unit, position)
    if kind == "gradient" and unit.trainable and not unit.has_grad:
        unit.settle_gradient()
        unit.grad.zero_()  # it may hold that of an earlier step
    if piece is not None:
        with torch.no_grad(), _held(optimizer, unit, piece, kind, edits=True) as mine:
            if kind in ("parameter", "gradient"):
                mine.copy_(part)
            else:
                _set_state(optimizer, unit, piece, kind, part)
    if kind == "gradient":
        unit.has_grad = True
        unit.used[position] = True


def _set_state(
    optimizer: HeldValues, unit: Unit, piece: Piece, kind: str, part: torch.Tensor
) -> None:
    inner, mine = optimizer._inner, _optimizer_piece(unit, piece)
    _local(optimizer, unit, piece, kind)  # raises where there is no such state
    unit.unstepped.discard(mine.weights)
    if not state_of(inner, mine.weights):
        allocate_state_of(inner, inner.param_groups[mine.group_index], mine.weights)
    if not isinstance(inner, PortableState):
        _local(optimizer, unit, piece, kind).copy_(part)
        return
    values = state_of(inner, mine.weights)
    start = piece.offset - mine.start
    values[kind][start : start + part.numel()].copy_(part)
    inner.load_portable_state(mine.weights, values)


def _stated(optimizer: HeldValues, unit: Unit, piece: Piece, kind: str) -> Any:
    """What a checkpoint holds of a parameter or state: `FlatShard`; a lazy one if it is on disk.

    What is in memory must not be lazy: a save that reads it late would find a step's part of it.
    """
    from ds_core.checkpoint import FlatShard

    shape, start = piece.slot.shape, piece.start
    if not unit.is_away(kind):
        return FlatShard(_local(optimizer, unit, piece, kind), shape, start)
    home = unit.shard_home if kind == "parameter" and unit.master is None else None
    own = slice(piece.offset, piece.offset + _numel(piece))
    if isinstance(home, HostShard):
        return FlatShard(home.host[own], shape, start)
    assert home is None or isinstance(home, DiskShard)

    def read() -> torch.Tensor:
        if home is not None:
            return home.read(own.start, own.stop)
        with _held(optimizer, unit, piece, kind, edits=False) as value:
            return value.clone()

    @torch.no_grad()
    def write(values: torch.Tensor) -> None:
        optimizer.before_change()
        if home is not None:
            home.write(own.start, values)
            return
        with _held(optimizer, unit, piece, kind, edits=True) as value:
            if kind == "parameter":
                value.copy_(values)
            else:
                _set_state(optimizer, unit, piece, kind, values)

    dtype = unit.weights_dtype
    if kind != "parameter":
        dtype = _local(optimizer, unit, piece, kind).dtype
    return FlatShard.lazy(_numel(piece), dtype, shape, start, read=read, write=write)


def model_state(optimizer: HeldValues) -> dict[str, Any]:
    """See `ZeroOptimizer.model_state`."""
    return {
        piece.slot.name: _stated(optimizer, unit, piece, "parameter")
        for unit in optimizer.units
        for piece in unit.layout.pieces(unit.group.rank)
    }


def optimizer_state(optimizer: HeldValues) -> dict[str, Any]:
    """See `ZeroOptimizer.state_dict`: {"state": {key: {name: value}}, "groups": [...]}."""
    tensors: dict[str, dict[str, Any]] = {}
    for unit in optimizer.units:
        held = {
            id(p): {} if p.weights in unit.unstepped else state_of(optimizer._inner, p.weights)
            for p in unit.optimizer_pieces
        }
        for piece in unit.layout.pieces(unit.group.rank) if unit.trainable else ():
            mine = _optimizer_piece(unit, piece)
            for key, value in held[id(mine)].items():
                entries = tensors.setdefault(key, {})
                if isinstance(value, torch.Tensor) and value.shape == mine.weights.shape:
                    entries[piece.slot.name] = _stated(optimizer, unit, piece, key)
                else:
                    # One value for all parameters of the piece, such as the step count. Each
                    # gets its own, since those in a checkpoint may differ.
                    is_tensor = isinstance(value, torch.Tensor)
                    entries[piece.slot.name] = value.clone() if is_tensor else value
    names: list[list[str]] = [[] for _ in optimizer.param_groups]
    for unit in optimizer.units:
        for spec in unit.specs:
            if spec.group_index is not None:
                names[spec.group_index].append(spec.name)
    groups = [
        {**{k: v for k, v in group.items() if k != "params"}, "names": sorted(own)}
        for group, own in zip(optimizer.param_groups, names, strict=True)
    ]
    return {"state": tensors, "groups": groups}


@torch.no_grad()
def adopt_loaded(optimizer: HeldValues, loaded: dict[str, dict[str, Any]]) -> None:
    """Take over from `loaded` what the optimizer keeps once per tensor, such as step counts.

    Where they differ within a piece, its parameters are given states of their own.
    """
    for unit in optimizer.units:
        if any(_differ(optimizer, unit, piece, loaded) for piece in unit.optimizer_pieces):
            split_by_parameter(optimizer._inner, unit)
        for piece in unit.optimizer_pieces:
            if isinstance(optimizer._inner, PortableState):
                with unit.present(piece, edits=True):
                    _adopt_packed(optimizer._inner, unit, piece, loaded)
                continue
            held = optimizer.state.get(piece.weights, {})
            for key in list(held):
                if is_wide(held[key]):
                    continue
                for value in _loaded_values(optimizer, unit, piece, loaded, key)[:1]:
                    held[key] = value.clone() if isinstance(value, torch.Tensor) else value


def _adopt_packed(
    inner: PortableState, unit: Unit, piece: OptimizerPiece, loaded: dict[str, dict[str, Any]]
) -> None:
    """Put what a checkpoint has for the parameters of a piece into its packed state."""
    values = inner.portable_state(piece.weights)
    for part in unit.parts_of(piece):
        start = part.offset - piece.start
        for key, own in values.items():
            value = loaded.get(key, {}).get(part.slot.name)
            if value is None or (is_wide(own) and value.is_lazy):
                continue  # a lazy one was written as it was read
            if is_wide(own):
                own[start : start + _numel(part)].copy_(value.local.reshape(-1))
            else:
                values[key] = value
    if values:
        inner.load_portable_state(piece.weights, values)


def _numel(piece: Piece) -> int:
    return piece.stop - piece.start


def _differ(
    optimizer: HeldValues, unit: Unit, piece: OptimizerPiece, loaded: dict[str, dict[str, Any]]
) -> bool:
    for key, own in state_of(optimizer._inner, piece.weights).items():
        if not is_wide(own):
            values = _loaded_values(optimizer, unit, piece, loaded, key)
            if any(value != values[0] for value in values):
                return True
    return False


def _loaded_values(
    optimizer: HeldValues,
    unit: Unit,
    piece: OptimizerPiece,
    loaded: dict[str, dict[str, Any]],
    key: str,
) -> list[Any]:
    """The loaded value of each parameter of a piece; its own for one that was not loaded."""
    own = optimizer.state[piece.weights][key]
    return [loaded.get(key, {}).get(part.slot.name, own) for part in unit.parts_of(piece)]


def memory(optimizer: HeldValues) -> dict[str, int]:
    """See `ZeroOptimizer.memory`."""
    return in_memory(memory_by_tier(optimizer))


def memory_by_tier(optimizer: HeldValues) -> dict[Place, dict[str, int]]:
    """See `ZeroOptimizer.memory_by_tier`."""
    return by_place(_holdings(optimizer))


def _holdings(optimizer: HeldValues) -> Iterator[Holding]:
    for unit in optimizer.units:
        yield from unit.holdings()
        place = unit.states_place
        for piece in unit.optimizer_pieces:
            gap = unit.gap_of(piece)
            weights = piece.weights
            if unit.master is not None and unit.states == "nvme":
                size = weights.element_size()
                yield Holding("disk", "master", weights.numel() * size, gap * size)
            # Not `optimizer.state`: to ask for it is to want all states in their places.
            for value in optimizer._inner.state.get(weights, {}).values():
                if is_wide(value):
                    size = value.element_size()
                    padding = gap * size if value.shape == weights.shape else 0
                    yield Holding(place, "optimizer", value.numel() * size, padding)
    yield Holding("host", "buffers", optimizer._homes.buffer_bytes)
    yield Holding("host", "buffers", optimizer._host_step.buffer_bytes())
