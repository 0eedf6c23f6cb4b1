"""Tensors of a checkpoint that are read when they are asked for, whatever format it has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_core.checkpoint.box_reader import BoxReader
from ds_core.checkpoint.boxes import Box
from ds_core.checkpoint.index import Index, KeyPath, TensorRecord
from ds_core.checkpoint.store import find, read_state
from ds_core.errors import CheckpointError

MODEL = "model"
OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint: what it is, and how to read it.

    Attributes:
        path: keys that lead to it in the nested state, such as `("model", "head.weight")`.
        dtype, shape: of the whole tensor.
        read: reads all of it, on the CPU; each call reads anew.
        read_flat: reads elements `[start, stop)` of its flattening, where that takes less.
    """

    path: KeyPath
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    read_flat: Callable[[int, int], torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return Box.whole(self.shape).numel * self.dtype.itemsize

    def flat(self, start: int, stop: int) -> torch.Tensor:
        """`[stop - start]`: elements of its row-major flattening, on the CPU."""
        if self.read_flat is not None:
            return self.read_flat(start, stop)
        return self.read().reshape(-1)[start:stop]


def in_memory(path: KeyPath, tensor: torch.Tensor) -> LazyTensor:
    """A tensor that needs no reading, or only that of a mapped file."""
    return LazyTensor(path, tensor.dtype, tuple(tensor.shape), lambda: tensor)


@dataclass
class LazyState:
    """The state of a whole training job, in the layout of an `Engine`'s checkpoint.

    Attributes:
        tensors: by fully qualified name.
        values: what is not a tensor, nested.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


class LazyStateDict(Mapping[str, torch.Tensor]):
    """A state dict that reads each tensor from its checkpoint when it is looked up.

    `len`, `in` and iteration over the names read nothing. A tensor is read, verified and assembled
    on the CPU at every look-up and not kept, so a loop over it holds one tensor at a time.
    `dict(state)` reads them all, and so does `module.load_state_dict(state)`.

    Args:
        tensors: by name.
        dtype: what floating-point tensors are converted to. Default: as saved.
        aliases: further names of some of the tensors.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        *,
        dtype: torch.dtype | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self._dtype = dtype
        self.aliases = {a: name for a, name in (aliases or {}).items() if name in self._tensors}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._lazy(name).read().to(self.dtype(name))

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors
        yield from self.aliases

    def __len__(self) -> int:
        return len(self._tensors) + len(self.aliases)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self.aliases

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; reads nothing."""
        return self._lazy(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor will have; reads nothing."""
        return converted_dtype(self._lazy(name).dtype, self._dtype)

    def _lazy(self, name: str) -> LazyTensor:
        return self._tensors[self.aliases.get(name, name)]


def full_state_dict(
    directory: str | os.PathLike[str],
    tag: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    prefix: str = f"{MODEL}.",
    exclude_frozen: bool = False,
    aliases: bool = True,
) -> LazyStateDict:
    """The model of a checkpoint as a state dict of whole tensors, each read when looked up.

    Needs neither the model, nor the ranks that saved it, nor a device. Weights come from the most
    precise copy that there was, such as the fp32 master copy of a bf16 run.
    Collective: no.

    Args:
        directory: holds the checkpoints, or is one.
        tag: which one. Default: the one that `latest` names.
        dtype: what floating-point tensors are converted to. Default: as saved.
        prefix: which tensors, and what to cut off their names. `""` for all, under full names.
        exclude_frozen: leave out the parameters that were not trained.
        aliases: whether a tied weight is there under each of its names, or under one only.

    Raises:
        CheckpointError: as `find` does, or if no tensor's name has the prefix.

    Example:
        >>> from ds_core import checkpoint
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> _ = checkpoint.save(folder, "a", {"model": {"weight": torch.ones(2)}})
        >>> weights = checkpoint.full_state_dict(folder)
        >>> list(weights), weights.shape("weight"), weights["weight"]
        (['weight'], (2,), tensor([1., 1.]))
    """
    path = find(directory, tag)
    state = open_checkpoint(path)
    about = state.values.get("about", {})
    skipped = frozen_names(path, about) if exclude_frozen else set()
    chosen = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.tensors.items()
        if name.startswith(prefix) and not (tensor.path[0] == MODEL and tensor.path[-1] in skipped)
    }
    if not chosen:
        tops = sorted({name.split(".")[0] + "." for name in state.tensors})
        raise CheckpointError(
            f"{path}: no tensor's name starts with {prefix!r}; prefixes are {', '.join(tops)}"
        )
    cut = f"{MODEL}.".removeprefix(prefix)
    table = {cut + a: cut + name for a, name in about.get("aliases", {}).items()} if aliases else {}
    return LazyStateDict(chosen, dtype=dtype, aliases=table)


def open_checkpoint(path: str | os.PathLike[str]) -> LazyState:
    """All of one checkpoint of this format; its data files are opened when a tensor is read."""
    folder = find(path, None)
    index = Index.read(folder)
    index.check_coverage()
    tensors = {
        name: LazyTensor(record.path, record.dtype, record.shape, _reader(folder, index, record))
        for name, record in index.tensors.items()
    }
    return LazyState(tensors, read_state(folder))


def frozen_names(path: object, about: Mapping[str, Any]) -> set[str]:
    """The parameters that were not trained. Raises CheckpointError if that was not recorded."""
    if "frozen" not in about:
        raise CheckpointError(
            f"{path} does not say which parameters were frozen: it was not saved by an Engine of "
            "this release; export all of them"
        )
    return set(about["frozen"])


def converted_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """`wanted` for a floating-point tensor; whole numbers stay as they are."""
    return own if wanted is None or not own.is_floating_point else wanted


def _reader(folder: Any, index: Index, record: TensorRecord) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with BoxReader(folder, index) as boxes:
            return assemble(boxes, record)

    return read


def assemble(boxes: BoxReader, record: TensorRecord) -> torch.Tensor:
    """The whole tensor, from its boxes, on the CPU."""
    whole = torch.empty(record.shape, dtype=record.dtype)
    for stored in record.boxes:
        target = whole
        for dim, length in enumerate(stored.box.lengths):
            target = target.narrow(dim, stored.box.offsets[dim], length)
        boxes.copy(record, stored, Box.whole(stored.box.lengths), target)
    return whole
