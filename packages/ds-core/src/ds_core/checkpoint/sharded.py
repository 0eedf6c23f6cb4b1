"""`FlatShard`: the statement that this rank holds a flat range of a larger tensor."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ds_core.checkpoint.boxes import Box, Piece, cut_range
from ds_core.errors import CheckpointError

_aten = torch.ops.aten
#: The operations that act on the held elements one by one and leave the statement true.
_ELEMENTWISE = (
    _aten.detach.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten._to_copy.default,
)


class FlatShard(torch.Tensor):
    """This rank's flat elements `[start, start + local.numel())` of a tensor, for a checkpoint.

    It has the shape of the whole tensor, so that it can stand for it in a state dict, but no
    storage of its own. `torch.distributed.checkpoint` saves it as at most 2d-1 boxes of the whole
    tensor, under the tensor's name, and loads it by writing straight into `local`. Of computation
    it supports only detaching and copying (`clone`, `to`), which staging for an asynchronous save
    needs.

    Args:
        local: `[n]`, any dtype, contiguous, usually a view of a live flat buffer; it is not
            copied. May be empty: the rank then holds nothing of this tensor.
        global_shape: shape of the whole tensor; `()` for a scalar.
        start: index of `local[0]` in the row-major flattening of the whole tensor, or of `within`.
        within: the block of the whole tensor whose flattening is cut, for a tensor that is also
            split over tensor- or expert-parallel ranks. Default: all of it.

    Raises:
        CheckpointError: if `local` is not flat and contiguous, or reaches beyond the tensor.

    A shard that is not in memory, such as one on NVMe, is made by `FlatShard.lazy`.

    Example:
        >>> buffer = torch.arange(10.0)
        >>> shard = FlatShard(buffer[2:8], global_shape=(3, 4), start=5)
        >>> [piece.box.lengths for piece in shard.pieces]
        [(1, 3), (1, 3)]
    """

    start: int
    within: Box
    pieces: tuple[Piece, ...]
    held_numel: int
    _local: torch.Tensor | None
    _read: Callable[[], torch.Tensor] | None
    _write: Callable[[torch.Tensor], None] | None

    @staticmethod
    def __new__(
        cls: type[FlatShard],
        local: torch.Tensor,
        global_shape: Sequence[int],
        start: int = 0,
        *,
        within: Box | None = None,
    ) -> FlatShard:
        _check(local)
        shard = _stating(cls, local.numel(), local.dtype, local.device, global_shape, start, within)
        shard._local = local.detach()
        return shard

    @classmethod
    def lazy(
        cls,
        numel: int,
        dtype: torch.dtype,
        global_shape: Sequence[int],
        start: int = 0,
        *,
        read: Callable[[], torch.Tensor],
        write: Callable[[torch.Tensor], None] | None = None,
        within: Box | None = None,
    ) -> FlatShard:
        """The same statement about elements that are not in memory, such as those on NVMe.

        Saving reads such shards one at a time, each when its bytes are written, and loading fills
        them one at a time, so that a state much larger than memory passes through it. Only
        `SafetensorsWriter` and `SafetensorsReader`, and so `save`, `AsyncSaver` and `load`, know
        how to take turns; another storage back end gets an error.

        During an asynchronous save `read` is called from the thread that writes, while training
        goes on: before the owner overwrites what it reads, it calls `AsyncSaver.wait_for_reads`,
        as the engine does before each update.

        Args:
            numel: elements that this rank holds.
            dtype: of the elements.
            global_shape, start, within: as for `FlatShard`.
            read: returns the elements, `[numel]` and contiguous, on any device; may be called
                several times. The tensor is let go before the next shard's is asked for, so that it
                may be a buffer that all shards share.
            write: takes the elements that a checkpoint had, `[numel]` on the CPU, in a buffer that
                is not used again. Default: the shard can be saved only.
        """
        device = torch.device("cpu")
        shard = _stating(cls, numel, dtype, device, global_shape, start, within)
        shard._local, shard._read, shard._write = None, read, write
        return shard

    @property
    def local(self) -> torch.Tensor:
        """The elements: `[held_numel]`. Raises CheckpointError if they are not in memory."""
        if self._local is None:
            raise CheckpointError(
                f"{self!r} is not in memory: it is read and written within `with shard.opened()`"
            )
        return self._local

    @property
    def is_lazy(self) -> bool:
        """Whether the elements are read when they are needed."""
        return self._read is not None

    @contextlib.contextmanager
    def opened(self, *, fill: bool = False) -> Iterator[torch.Tensor]:
        """The elements, in memory while the block runs.

        Args:
            fill: the block overwrites all of them. What it has written is kept, or written back
                if the shard is lazy; a block that raises changes nothing then.
        """
        if self._read is None:
            yield self.local
            return
        if fill and self._write is None:
            raise CheckpointError(f"{self!r} can be saved only: it was made without `write`")
        self._local = (
            torch.empty(self.held_numel, dtype=self.dtype) if fill else self._checked(self._read())
        )
        try:
            yield self._local
            if fill and self._write is not None:
                self._write(self._local)
        finally:
            self._local = None

    def _checked(self, read: torch.Tensor) -> torch.Tensor:
        if read.numel() != self.held_numel or read.dtype != self.dtype:
            raise CheckpointError(
                f"{self!r}: its `read` returned {read.dtype} {list(read.shape)}, expected "
                f"{self.dtype} [{self.held_numel}]"
            )
        _check(read)
        return read.detach()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _ELEMENTWISE:
            shard = args[0]
            if shard.is_lazy:
                raise CheckpointError(f"{func} cannot run on {shard!r}: it is not in memory")
            local = func(shard.local, *args[1:], **(kwargs or {}))
            return cls(local, shard.shape, shard.start, within=shard.within)
        raise CheckpointError(
            f"{func} cannot run on a FlatShard: it only states which elements of a tensor this "
            "rank holds, for a checkpoint. Compute on its .local, a plain 1-D tensor"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        stop = self.start + self.held_numel
        kind = "lazy " * self.is_lazy
        return f"{kind}FlatShard([{self.start}, {stop}) of {list(self.shape)}, dtype={self.dtype})"

    def box_view(self, piece: Piece) -> torch.Tensor:
        """The elements of one piece, with the shape of its box: a view of `local`."""
        box, position = piece
        return self.local[position : position + box.numel].view(box.lengths)

    # The three methods below are torch.distributed.checkpoint's protocol for tensors of this kind.

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if math.prod(self.shape) == 0:  # no elements to hold, but the checkpoint must know of it
            return [ChunkStorageMetadata(torch.Size([0] * self.dim()), self.shape)]
        return [
            ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.lengths))
            for box, _ in self.pieces
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        if math.prod(self.shape) == 0:
            return self.local.view(self.shape)
        for piece in self.pieces:
            if piece.box.offsets == index.offset:
                return self.box_view(piece)
        raise CheckpointError(
            f"{index.fqn}: this rank holds no box at {index.offset}; "
            f"its boxes start at {[box.offsets for box, _ in self.pieces]}"
        )


class OneAtATime:
    """Opens lazy shards of a state in turn, so that one of them is in memory; a context manager.

    Args:
        state: by name; what is not lazy needs no turn.
        fill: whether the shards are written, as `FlatShard.opened` says.
    """

    def __init__(self, state: Mapping[str, Any], *, fill: bool = False) -> None:
        self._state, self._fill = state, fill
        self._name: str | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> OneAtATime:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def to(self, name: str) -> None:
        """It is this tensor's turn; that of the one before has ended."""
        if name == self._name:
            return
        self._open.close()
        self._name = name
        shard = self._state.get(name)
        if isinstance(shard, FlatShard) and shard.is_lazy:
            self._open.enter_context(shard.opened(fill=self._fill))


def is_lazy(value: Any) -> bool:
    """Whether a value of a state is a lazy shard."""
    return isinstance(value, FlatShard) and value.is_lazy


def _stating(
    cls: type[FlatShard],
    numel: int,
    dtype: torch.dtype,
    device: torch.device,
    global_shape: Sequence[int],
    start: int,
    within: Box | None,
) -> FlatShard:
    """A shard that states its range, and has no elements yet."""
    shape = tuple(global_shape)
    within = Box.whole(shape) if within is None else within
    if not within.fits(shape):
        raise CheckpointError(f"FlatShard: within: {within} does not fit into {list(shape)}")
    pieces = cut_range(within.lengths, start, start + numel)
    shard = torch.Tensor._make_wrapper_subclass(
        cls, shape, dtype=dtype, device=device, requires_grad=False
    )
    shard._read = shard._write = None
    shard.start, shard.within, shard.held_numel = start, within, numel
    shard.pieces = tuple(Piece(box.shifted(within.offsets), at) for box, at in pieces)
    return shard


def _check(local: torch.Tensor) -> None:
    if local.dim() != 1 or not local.is_contiguous():
        raise CheckpointError(
            f"FlatShard: local: got shape {list(local.shape)} with strides "
            f"{list(local.stride())}, expected a contiguous 1-D tensor"
        )
    if local.is_meta:
        raise CheckpointError("FlatShard: local: got a meta tensor, expected one with storage")
