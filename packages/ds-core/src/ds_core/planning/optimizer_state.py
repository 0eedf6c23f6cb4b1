"""What an optimizer keeps beside each parameter, found by letting it take one step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ds_core import optimizers
from ds_core.errors import PlanError


class OptimizerState:
    """Bytes of optimizer state per parameter.

    Args:
        choice: the config's optimizer section; None: AdamW, for one that is built in code.
    """

    def __init__(self, choice: optimizers.Choice | None) -> None:
        self._choice = choice
        self.name = "AdamW" if choice is None else choice.type
        self._known: dict[tuple[tuple[int, ...], torch.dtype], int] = {}
        small = self.tensor_bytes((2, 3), torch.float32), self.tensor_bytes((5, 7), torch.float32)
        #: Whether it treats every element alike, so that a flat shard costs its share.
        self.is_elementwise = small[0] * 35 == small[1] * 6

    def tensor_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of state of one tensor; numbers kept once per tensor, as its step, left out."""
        key = (shape, dtype)
        if key not in self._known:
            self._known[key] = self._probe(shape, dtype)
        return self._known[key]

    def flat_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """Bytes of state of `numel` elements of a flat buffer."""
        if not self.is_elementwise:
            raise PlanError(
                f"optimizer.type: {self.name} keeps state by rows and columns of whole matrices, "
                f"so it cannot step on flat shards; use zero_optimization.stage 0, or an "
                f"elementwise optimizer such as AdamW"
            )
        return numel * self.tensor_bytes((2, 3), dtype) // 6

    def total_bytes(self, tensors: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> int:
        """Bytes of state of whole tensors, given by shape and dtype."""
        if self.is_elementwise:
            return sum(self.flat_bytes(_numel(shape), dtype) for shape, dtype in tensors)
        return sum(self.tensor_bytes(shape, dtype) for shape, dtype in tensors)

    def _probe(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        with torch.device("cpu"):
            param = nn.Parameter(torch.zeros(shape, dtype=dtype))
            built: torch.optim.Optimizer
            if self._choice is None:
                built = torch.optim.AdamW([param])
            else:
                built = optimizers.build(self._choice, [param])
            param.grad = torch.zeros_like(param)
            built.step()
        return sum(
            value.numel() * value.element_size()
            for value in built.state.get(param, {}).values()
            if isinstance(value, torch.Tensor) and value.dim()
        )


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
