"""What an optimizer keeps beside each parameter, found by letting it step on tiny ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from ds_core import ops, optimizers
from ds_core.errors import PlanError

#: Sizes of a tiny tensor's dimensions, all different, so that a state's dimensions tell whose.
_TINY = (3, 5, 7, 11, 13, 17)

#: Elements of which blocks keep less than a byte each.
_MANY = 1 << 20

#: A tensor: its name, shape and dtype.
Described = tuple[str, Sequence[int], torch.dtype]


class OptimizerState:
    """Bytes of optimizer state per parameter.

    Args:
        choice: the config's optimizer section; None: AdamW, for one that is built in code.
    """

    def __init__(self, choice: optimizers.Choice | None) -> None:
        self._choice = choice
        #: Set where an optimizer says itself what it keeps of a number of elements.
        self._told: Callable[[int], int] | None = None
        self.name = "AdamW" if choice is None else choice.type
        self.class_name, flat = self._probe([("flat", (3,), torch.float32)])
        _, matrix = self._probe([("layer.weight", (3, 5), torch.float32)])
        #: Whether every element has the same state, so that a flat shard holds its share.
        self.is_elementwise = self._told is not None or 5 * sum(flat) == sum(matrix)
        self._per_element: dict[torch.dtype, int] = {torch.float32: sum(flat) // 3}

    def flat_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """Bytes of state of `numel` elements of a flat buffer."""
        if not self.is_elementwise:
            raise PlanError(
                f"optimizer.type: {self.name} keeps state by rows and columns of whole matrices, "
                f"so it cannot step on flat shards; use zero_optimization.stage 0, or an "
                f"elementwise optimizer such as AdamW"
            )
        if self._told is not None:
            return self._told(numel)
        if dtype not in self._per_element:
            self._per_element[dtype] = sum(self._probe([("flat", (3,), dtype)])[1]) // 3
        return numel * self._per_element[dtype]

    def gap_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """Bytes of state of elements that belong to no parameter: what each has, no block's."""
        if self._told is not None:
            return numel * (self._told(_MANY) // _MANY)
        return self.flat_bytes(numel, dtype)

    def total_bytes(self, tensors: Iterable[Described]) -> int:
        """Bytes of state of whole tensors; numbers kept once per tensor, as its step, left out."""
        described = list(tensors)
        if self.is_elementwise:
            return sum(self.flat_bytes(math.prod(shape), dtype) for _, shape, dtype in described)
        return sum(self._probe(described)[1])

    def _probe(self, tensors: Sequence[Described]) -> tuple[str, list[int]]:
        """The optimizer's class, and bytes of state per tensor.

        Steps on tensors of the same number of dimensions but tiny ones, and scales what it finds.
        """
        with torch.device("cpu"):
            named = [
                (name, nn.Parameter(torch.zeros(_tiny(shape), dtype=dtype)))
                for name, shape, dtype in tensors
            ]
            built: torch.optim.Optimizer
            if self._choice is None:
                built = torch.optim.AdamW([param for _, param in named])
            else:
                built = optimizers.build(self._choice, named)
            self._told = getattr(built, "state_bytes", None)
            for _, param in named:
                param.grad = torch.zeros_like(param)
            # What is asked is what it keeps: no kernel need be built for that.
            with ops.use(**dict.fromkeys(getattr(built, "ops", ()), "reference")):
                built.step()
        sizes = []
        for (_, param), (_, shape, _) in zip(named, tensors, strict=True):
            values = built.state.get(param, {}).values()
            states = [v for v in values if isinstance(v, torch.Tensor) and v.dim()]
            sizes.append(sum(_full_bytes(state, param.shape, shape) for state in states))
        return type(built).__name__, sizes


def _tiny(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(tiny if size > 1 else size for size, tiny in zip(shape, _TINY, strict=False))


def _full_bytes(state: torch.Tensor, tiny: Sequence[int], shape: Sequence[int]) -> int:
    """Bytes of a state whose dimensions grow with those of its parameter."""
    full = dict(zip(tiny, shape, strict=True))
    return math.prod(full.get(size, size) for size in state.shape) * state.element_size()
