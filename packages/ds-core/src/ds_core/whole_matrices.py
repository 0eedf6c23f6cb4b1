"""Optimizers that update whole matrices, and how their step comes apart to be shared by ranks."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class WholeMatrices(Protocol):
    """An optimizer some of whose parameters are updated as whole matrices, such as Muon.

    A step of such a parameter has three parts, of which only the second needs the matrix whole:
    `direction`, `whole_update`, `apply_update`. A sharding runs the first and the last on the parts
    of matrices that each rank holds, and the second where the matrix was put together. The result
    has the same bits as `step` on one rank.
    """

    @property
    def direction_dtype(self) -> torch.dtype:
        """The format of directions and updates, in which they travel."""

    def is_whole(self, group: dict[str, Any]) -> bool:
        """Whether the parameters of a group are updated as whole matrices; the others are not."""

    def direction(
        self,
        group: dict[str, Any],
        param: torch.Tensor,
        grad: torch.Tensor,
        grad_scale: float | torch.Tensor = 1.0,
    ) -> torch.Tensor:
        """Update the state of `param`, any part of a matrix, and return what becomes its update.

        Elementwise. In the shape of `param`.
        """

    def whole_update(self, group: dict[str, Any], direction: torch.Tensor) -> torch.Tensor:
        """The update of a matrix, of its whole direction `[rows, columns]`; contiguous."""

    def apply_update(
        self,
        group: dict[str, Any],
        param: torch.Tensor,
        update: torch.Tensor,
        shape: tuple[int, ...],
    ) -> None:
        """Change any part of a matrix of `shape` by the same part of its update. Elementwise."""

    def matrix_flops(self, group: dict[str, Any], shape: tuple[int, ...]) -> int:
        """What `whole_update` of a matrix costs."""
