"""`FlatShard`: the statement that this rank holds a flat range of a larger tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

    Example:
        >>> buffer = torch.arange(10.0)
        >>> shard = FlatShard(buffer[2:8], global_shape=(3, 4), start=5)
        >>> [piece.box.lengths for piece in shard.pieces]
        [(1, 3), (1, 3)]
    """

    local: torch.Tensor
    start: int
    within: Box
    pieces: tuple[Piece, ...]

    @staticmethod
    def __new__(
        cls: type[FlatShard],
        local: torch.Tensor,
        global_shape: Sequence[int],
        start: int = 0,
        *,
        within: Box | None = None,
    ) -> FlatShard:
        shape = tuple(global_shape)
        within = Box.whole(shape) if within is None else within
        _check(local, shape, within)
        pieces = cut_range(within.lengths, start, start + local.numel())
        shard = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=False
        )
        shard.local = local.detach()
        shard.start = start
        shard.within = within
        shard.pieces = tuple(Piece(box.shifted(within.offsets), at) for box, at in pieces)
        return shard

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
            local = func(shard.local, *args[1:], **(kwargs or {}))
            return cls(local, shard.shape, shard.start, within=shard.within)
        raise CheckpointError(
            f"{func} cannot run on a FlatShard: it only states which elements of a tensor this "
            "rank holds, for a checkpoint. Compute on its .local, a plain 1-D tensor"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        stop = self.start + self.local.numel()
        return f"FlatShard([{self.start}, {stop}) of {list(self.shape)}, dtype={self.dtype})"

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


def _check(local: torch.Tensor, shape: tuple[int, ...], within: Box) -> None:
    if local.dim() != 1 or not local.is_contiguous():
        raise CheckpointError(
            f"FlatShard: local: got shape {list(local.shape)} with strides "
            f"{list(local.stride())}, expected a contiguous 1-D tensor"
        )
    if local.is_meta:
        raise CheckpointError("FlatShard: local: got a meta tensor, expected one with storage")
    if not within.fits(shape):
        raise CheckpointError(f"FlatShard: within: {within} does not fit into {list(shape)}")
