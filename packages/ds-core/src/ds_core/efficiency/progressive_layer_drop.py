"""Progressive layer dropping: whole blocks are left out at random, the deeper the more often.

Block i of L is kept with probability 1 - (i / L) (1 - theta(t)), where theta falls from 1 to a
limit: theta(t) = (1 - theta) exp(-gamma t) + theta. What a kept block adds is divided by that
probability, so that evaluation, which keeps all blocks, sees what training saw on average.

Source: Zhang and He 2020, "Accelerating Training of Transformer-Based Language Models with
Progressive Layer Dropping" (2010.13369), sections 4 and 5.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_core.efficiency.calls import change_call, repeated_blocks
from ds_core.errors import ConfigError, DsError
from ds_core.seams.observer import Event, EventKind

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.engine import Engine


def theta_at(step: int, theta: float, gamma: float) -> float:
    """The keep probability of the deepest block after `step` optimizer steps."""
    return (1.0 - theta) * math.exp(-gamma * step) + theta


class ProgressiveLayerDrop:
    """An engine's observer that leaves out blocks of the model in training.

    A model whose forward has an argument `pld_theta` does it itself: it is called with
    `progressive_layer_drop=True` (if it has that argument too) and `pld_theta`. Of any other model
    the blocks are left out: modules that take hidden states first and return hidden states of that
    shape, which add what they compute to what came in. The draw is alike on all ranks, so that all
    or none of them need a sharded block. Evaluation keeps all blocks.

    Args:
        theta: the limit, in (0, 1]; 1 keeps everything.
        gamma: how fast it is approached, per step.
        blocks: which modules, first to last; None: those of the model's only repeated stack.
        returns_tuple: whether a block returns its hidden states as a tuple of one.
        seed: of the draws; equal on all ranks.

    There is no state: the draws are those of the engine's step.
    """

    def __init__(
        self,
        theta: float = 0.5,
        gamma: float = 0.001,
        *,
        blocks: Sequence[nn.Module] | None = None,
        returns_tuple: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 < theta <= 1 or gamma < 0:
            raise DsError(
                f"progressive_layer_drop: theta {theta} and gamma {gamma}; expected 0 < theta <= 1 "
                f"and gamma >= 0"
            )
        self.theta, self.gamma, self.seed = theta, gamma, seed
        self._returns_tuple = returns_tuple
        self._blocks = None if blocks is None else list(blocks)
        self._restores: list[Callable[[], None]] = []
        self._takes: set[str] = set()
        self._dropping: _Dropping | None = None
        self._micro_step = 0

    def on_event(self, engine: Engine, event: Event) -> None:
        """Find the blocks at the start, and give them back at the end."""
        if event.kind is EventKind.START:
            self._start(engine.module)
        elif event.kind is EventKind.STEP_BEGIN:
            self._micro_step = 0
        elif event.kind is EventKind.CLOSE:
            while self._restores:
                self._restores.pop()()

    def keep_probabilities(self, step: int, num_blocks: int) -> list[float]:
        """With what probability each block is kept after `step` optimizer steps."""
        missing = 1.0 - theta_at(step, self.theta, self.gamma)
        return [1.0 - (index + 1) / num_blocks * missing for index in range(num_blocks)]

    def adjust_inputs(
        self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Draw for one forward; see `InputAdjuster`."""
        step = engine.global_step
        if self._takes:
            theta = theta_at(step, self.theta, self.gamma)
            told = {"progressive_layer_drop": True, "pld_theta": theta}
            return args, {**kwargs, **{name: told[name] for name in self._takes}}
        assert self._dropping is not None
        # A text as the seed: Python hashes all of it, and the same everywhere.
        draws = random.Random(f"{self.seed}/{step}/{self._micro_step}")
        self._micro_step += 1
        probabilities = self.keep_probabilities(step, self._dropping.num_blocks)
        self._dropping.keep = [
            probability if draws.random() < probability else None for probability in probabilities
        ]
        return args, kwargs

    def _start(self, model: nn.Module) -> None:
        arguments = inspect.signature(model.forward).parameters
        if self._blocks is None and "pld_theta" in arguments:
            self._takes = {"progressive_layer_drop", "pld_theta"} & set(arguments)
            return
        blocks = self._blocks
        if blocks is None:
            try:
                blocks = repeated_blocks(model)
            except DsError as error:
                raise ConfigError(f"progressive_layer_drop: {error}") from error
        self._dropping = _Dropping(len(blocks), self._returns_tuple)
        for index, block in enumerate(blocks):
            changed = _Droppable(self._dropping, index, block)
            self._restores.append(change_call(block, changed))


class _Dropping:
    """What all blocks of a model share.

    Attributes:
        keep: for each block of the present forward, its keep probability; None: it is left out.
        returns_tuple: whether a block returns its hidden states as a tuple of one.
    """

    def __init__(self, num_blocks: int, returns_tuple: bool) -> None:
        self.num_blocks, self.returns_tuple = num_blocks, returns_tuple
        self.keep: list[float | None] = [1.0] * num_blocks


class _Droppable:
    """What a block is called through."""

    def __init__(self, dropping: _Dropping, index: int, block: nn.Module) -> None:
        self._dropping, self._index, self._block = dropping, index, block

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        shared = self._dropping
        if not self._block.training:
            return call(*args, **kwargs)
        hidden = args[0] if args else next(iter(kwargs.values()), None)
        probability = shared.keep[self._index]
        if probability is None:
            return (hidden,) if shared.returns_tuple else hidden
        output = call(*args, **kwargs)
        found = output
        if shared.returns_tuple and isinstance(output, tuple) and len(output) == 1:
            found = output[0]
        if not (isinstance(found, torch.Tensor) and isinstance(hidden, torch.Tensor)) or (
            found.shape != hidden.shape
        ):
            raise DsError(
                f"progressive_layer_drop: {type(self._block).__name__} must take hidden states "
                f"first and return them, in the same shape and alone; got "
                f"{type(hidden).__name__} and returned {type(output).__name__} (for a tuple of "
                f"one, pass ProgressiveLayerDrop(returns_tuple=True) to initialize(observers=))"
            )
        if probability != 1.0:
            found = hidden + (found - hidden) / probability
        return (found,) if shared.returns_tuple else found


def progressive_layer_drop_observer(config: Config) -> ProgressiveLayerDrop | None:
    """The layer dropping that a config asks for, or None."""
    from ds_core.efficiency.config import ProgressiveLayerDropSection

    section = config.section("progressive_layer_drop")
    if not isinstance(section, ProgressiveLayerDropSection) or not section.enabled:
        return None
    return ProgressiveLayerDrop(section.theta, section.gamma, seed=config.seed or 0)
