"""What becomes of the inputs of checkpointed blocks until their backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.autograd.graph import saved_tensors_hooks

from ds_core import comm
from ds_core.activation_checkpointing.host_offload import HostOffload
from ds_core.activation_checkpointing.partition import Partition


class InputStorage:
    """Hooks under which autograd's saved tensors are split over ranks, wait on the host, or both.

    Args:
        offload: to the host, or None.
        partition_group: ranks over which each tensor is split, or None.
        reuses_buffers: see `Partition`.
    """

    def __init__(
        self,
        offload: HostOffload | None,
        partition_group: comm.Group | None = None,
        *,
        reuses_buffers: bool = False,
    ) -> None:
        self._offload = offload
        self._keeper: HostOffload | Partition | None = offload
        # The only rank of a group would keep all of every tensor.
        if partition_group is not None and partition_group.size > 1:
            self._keeper = Partition(partition_group, offload, reuses_buffers=reuses_buffers)

    def __deepcopy__(self, memo: dict[int, Any]) -> InputStorage:
        # A copy of a model uses the same buffers.
        return self

    def saving(self) -> AbstractContextManager[Any]:
        """The context in which the inputs of the next block are saved."""
        if self._keeper is None:
            return nullcontext()
        if self._offload is not None:
            self._offload.begin_block()
        return saved_tensors_hooks(self._keeper.pack, self._keeper.unpack)
