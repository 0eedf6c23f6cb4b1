"""Inputs of checkpointed blocks that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ds_core.errors import DsError


class Unmoved(NamedTuple):
    """A tensor that is kept as it is, and how often it had been changed in place."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Unmoved:
        """The tensor as it is now."""
        return cls(tensor, tensor._version)

    def checked(self) -> torch.Tensor:
        """The tensor. Raises DsError if it was changed since; torch looks no more after hooks."""
        if self.tensor._version != self.version:
            raise changed_in_place(self.tensor.shape)
        return self.tensor


def changed_in_place(shape: Sequence[int]) -> DsError:
    """The error for an input that is not what it was."""
    return DsError(
        f"an input of a checkpointed block, of shape {list(shape)}, was changed in place after the "
        f"forward, so the block cannot be computed again; make the change out of place"
    )
