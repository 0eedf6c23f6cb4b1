"""Weights of Hugging Face's files, read straight into what each rank holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ds_core.checkpoint.boxes import Box, cut_reads
from ds_core.checkpoint.data_file import PIECE_BYTES
from ds_core.checkpoint.foreign import weights
from ds_core.checkpoint.lazy import LazyTensor
from ds_core.checkpoint.ranks import Ranks
from ds_core.checkpoint.sharded import FlatShard
from ds_core.errors import CheckpointError


class LoadedWeights(NamedTuple):
    """What `load_weights` did on this rank.

    Attributes:
        num_tensors: tensors that were found for the model.
        bytes_read: bytes of weights that this rank read.
        missing: names of the model that the files lack; they keep their values.
        unexpected: names in the files that the model lacks.
    """

    num_tensors: int
    bytes_read: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def load_weights(
    source: str | os.PathLike[str],
    targets: Mapping[str, torch.Tensor],
    *,
    aliases: Mapping[str, str] | None = None,
    rename: Callable[[str], str | None] | None = None,
    strict: bool = True,
    group: dist.ProcessGroup | None = None,
) -> LoadedWeights:
    """Fill the tensors that this rank holds from a folder of safetensors, and say what was found.

    Of safetensors a rank reads only the elements that it holds, at most 16 MiB at a time, so that
    no rank has a whole copy. Files of `torch.save` are mapped into memory. No code of a file runs.
    Collective: all ranks of `group` must call.

    Args:
        source: a folder as Hugging Face's libraries write it, with or without an index, or a file.
        targets: by name in the model: plain tensors, or `FlatShard`s of what this rank holds (of
            no elements, where that is nothing). Written in place; values are converted to their
            dtype and device.
        aliases: further names of tied weights, and the name in `targets` of each. The files may
            hold any of the names; where they hold several, they must agree.
        rename: called with each name in the files; returns that in the model, or None for one to
            leave out.
        strict: whether a name that only the model or only the files have is an error.
        group: ranks that load. Default: all.

    Raises:
        CheckpointError: on every rank: a file is missing, damaged or asks for code, shapes differ,
            names do (if `strict`), or the copies of a tied weight. Tensors may have been partly
            overwritten in the last case.
    """
    ranks = Ranks(group)
    what = f"loading weights from {source}"
    names = _names_by_target(targets, aliases or {})
    matched = ranks.each(
        what, lambda: _match(Path(source), targets, names, rename=rename, strict=strict)
    )
    bytes_read = ranks.each(what, lambda: _fill_all(targets, matched.found))
    return LoadedWeights(len(matched.found), bytes_read, matched.missing, matched.unexpected)


class _Matched(NamedTuple):
    found: dict[str, list[LazyTensor]]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def _names_by_target(
    targets: Iterable[str], aliases: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Every name of each target, its own first."""
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in targets}
    for alias, name in aliases.items():
        if name in names and alias != name:
            names[name] = (*names[name], alias)
    return names


def _match(
    source: Path,
    targets: Mapping[str, torch.Tensor],
    names: Mapping[str, tuple[str, ...]],
    *,
    rename: Callable[[str], str | None] | None,
    strict: bool,
) -> _Matched:
    """Which tensors of the files belong to which target."""
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; name a folder of weights, or a file")
    opened = weights.open_weights(source)
    if opened.missing:
        raise CheckpointError(f"{source} is incomplete: {'; '.join(opened.missing[:4])}")
    held: dict[str, LazyTensor] = {}
    for tensor in opened.state.tensors.values():
        name = str(tensor.path[-1])
        renamed = name if rename is None else rename(name)
        if renamed in held:
            raise CheckpointError(f"{source}: rename gives two tensors the name {renamed!r}")
        if renamed is not None:
            held[renamed] = tensor
    found = {
        name: [held[own] for own in every if own in held]
        for name, every in names.items()
        if any(own in held for own in every)
    }
    missing = tuple(sorted(targets.keys() - found.keys()))
    unexpected = tuple(sorted(held.keys() - {own for every in names.values() for own in every}))
    complaints = [
        f"{name}: the files have {list(tensor.shape)}, the model {list(targets[name].shape)}"
        for name, tensors in found.items()
        for tensor in tensors
        if tensor.shape != tuple(targets[name].shape)
    ]
    if strict and missing:
        complaints.append(f"the model has, but the files lack: {_listed(missing)}")
    if strict and unexpected:
        complaints.append(f"the files have, but the model lacks: {_listed(unexpected)}")
    if complaints:
        raise CheckpointError(
            f"{source} holds the weights of another model; {'; '.join(complaints[:6])}. Map names "
            "with rename=, or load what both have with strict=False"
        )
    return _Matched(found, missing, unexpected)


def _listed(names: tuple[str, ...], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@torch.no_grad()
def _fill_all(targets: Mapping[str, torch.Tensor], found: Mapping[str, list[LazyTensor]]) -> int:
    total = 0
    for name, tensors in found.items():
        target = targets[name]
        with target.opened(fill=True) if isinstance(target, FlatShard) else nullcontext():
            total += _fill(name, target, tensors)
    return total


def _fill(name: str, target: torch.Tensor, tensors: list[LazyTensor]) -> int:
    """Copy the first of some tensors, which must agree, into a target; returns the bytes read."""
    total = 0
    for position, tensor in enumerate(tensors):
        for read, slot in _parts(tensor, target):
            total += read.numel() * read.element_size()
            if position == 0:
                slot.copy_(read)
            elif not torch.equal(slot, read.to(slot)):
                raise CheckpointError(
                    f"{name}: the model ties it to another name, under which the files hold "
                    "other values; build the model with the two untied"
                )
    return total


def _parts(tensor: LazyTensor, target: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """What is read of a tensor, piece by piece, and the view of the target that it belongs to."""
    if isinstance(target, FlatShard):
        boxes = [(piece.box, target.box_view(piece)) for piece in target.pieces]
    else:
        boxes = [(Box.whole(tuple(target.shape)), target.detach())]
    for box, whole in boxes:
        reads = cut_reads(
            tensor.shape, box, max_gap=0, max_numel=PIECE_BYTES // tensor.dtype.itemsize
        )
        for read in reads:
            values = tensor.flat(read.start, read.start + Box.whole(read.shape).numel)
            slot = whole[read.at]
            if read.shape:
                slot = slot.narrow(0, read.row, read.shape[0])
            yield values.view(read.shape), slot
