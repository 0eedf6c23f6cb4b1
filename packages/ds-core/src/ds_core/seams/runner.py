"""How the micro-batches of one step flow through the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from ds_core.comm import WeightedBatch
from ds_core.errors import DsError

if TYPE_CHECKING:
    from ds_core.engine import Engine


@runtime_checkable
class Runner(Protocol):
    """Runs the forwards and backwards of one optimizer step."""

    def run(self, engine: Engine, batches: Iterator[Any]) -> torch.Tensor:
        """Consume `engine.accumulation` micro-batches; returns their mean loss, detached.

        Leaves the optimizer stepped. Raises DsError if the batches run out before that.
        """


class Sequential:
    """Each micro-batch forward, then backward, one after the other.

    A batch of `comm.UnevenBatches` brings the weight of its loss.
    """

    def run(self, engine: Engine, batches: Iterator[Any]) -> torch.Tensor:
        total: torch.Tensor | None = None
        for number in range(engine.accumulation):
            try:
                batch = next(batches)
            except StopIteration:
                raise DsError(
                    f"train_batch: the data ended after {number} of {engine.accumulation} "
                    f"micro-batches of the step; give whole steps, or a repeating iterator"
                ) from None
            weight = 1.0
            if isinstance(batch, WeightedBatch):
                batch, weight = batch
            loss = loss_of(engine.run_batch(batch))
            if weight != 1.0:
                loss = loss * weight
            engine.backward(loss)
            engine.step()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total / engine.accumulation


def loss_of(output: Any) -> torch.Tensor:
    """The scalar loss in what a model returned: itself, `.loss`, ["loss"], or the first item.

    Raises DsError if there is none.
    """
    found = output
    if isinstance(output, dict):
        found = output.get("loss")
    elif hasattr(output, "loss"):
        found = output.loss
    elif isinstance(output, list | tuple) and output:
        found = output[0]
    if not isinstance(found, torch.Tensor) or found.numel() != 1:
        raise DsError(
            f"train_batch: the model must return a scalar loss, or an object, dict or tuple that "
            f"begins with one; got {type(output).__name__}"
            + (f" with a tensor of shape {list(found.shape)}" if torch.is_tensor(found) else "")
        )
    return found
