"""From a range test to a learning rate: which one to train with, by the losses that it gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.optim import Optimizer

from ds_core.errors import DsError

#: A loss that is this many times the best one so far has diverged.
_DIVERGED = 4.0


@dataclass(frozen=True)
class LRFinding:
    """What a range test tells.

    Attributes:
        lrs, losses: as recorded, without what came after the loss diverged.
        steepest: learning rate at which the smoothed loss fell fastest per decade: a good peak.
        lowest: that of the lowest smoothed loss: too large to train with, an upper bound.
        diverged_at: the first learning rate that made the loss diverge, or None.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    steepest: float
    lowest: float
    diverged_at: float | None

    def __str__(self) -> str:
        end = (
            "never diverged" if self.diverged_at is None else f"diverged at {self.diverged_at:.3g}"
        )
        return (
            f"learning-rate range test: the loss fell fastest at {self.steepest:.3g} (try this as "
            f"the peak), was lowest at {self.lowest:.3g}, {end}"
        )


def suggest_lr(
    lrs: Sequence[float], losses: Sequence[float], *, smoothing: float = 0.9
) -> LRFinding:
    """What the losses of steps with growing learning rates tell.

    Args:
        lrs: of each step, growing and positive.
        losses: of each step; not finite where it has diverged.
        smoothing: weight of the past in the running mean of the losses, in [0, 1).

    Raises DsError for fewer than 3 steps, lengths that differ, rates that do not grow, or if the
    loss diverged at once.

    Source: Smith 2018, "A disciplined approach to neural network hyper-parameters" (1803.09820).
    """
    if len(lrs) != len(losses) or len(lrs) < 3:
        raise DsError(
            f"suggest_lr: got {len(lrs)} learning rates and {len(losses)} losses, expected as many "
            f"of the one as of the other, and at least 3"
        )
    if not 0 <= smoothing < 1:
        raise DsError(f"suggest_lr: smoothing: got {smoothing}, expected at least 0 and below 1")
    if lrs[0] <= 0 or any(later < earlier for earlier, later in pairwise(lrs)):
        raise DsError("suggest_lr: the learning rates must be positive and grow from step to step")
    smooth: list[float] = []
    diverged_at: float | None = None
    mean = 0.0
    for step, (rate, loss) in enumerate(zip(lrs, losses, strict=True), start=1):
        mean = smoothing * mean + (1 - smoothing) * loss
        value = mean / (1 - smoothing**step)
        if not math.isfinite(value) or (smooth and _has_diverged(value, smooth)):
            diverged_at = rate
            break
        smooth.append(value)
    if diverged_at is not None and len(smooth) < 3:
        raise _diverged_at_once(len(smooth) + 1, diverged_at)
    return LRFinding(
        lrs=tuple(lrs[: len(smooth)]),
        losses=tuple(losses[: len(smooth)]),
        steepest=_steepest(lrs[: len(smooth)], smooth),
        lowest=lrs[smooth.index(min(smooth))],
        diverged_at=diverged_at,
    )


def find_lr(
    step: Callable[[], float | torch.Tensor],
    optimizer: Optimizer,
    *,
    min_lr: float = 1e-6,
    max_lr: float = 1.0,
    num_steps: int = 100,
    smoothing: float = 0.9,
) -> LRFinding:
    """Run a range test in any training loop: the rate grows by the same factor at every step.

    Weights and optimizer state are those of the test afterwards: build both anew to train. The
    groups' learning rates are put back.

    Args:
        step: takes one optimizer step and returns its loss.
        optimizer: all its groups get the same rate.
        min_lr, max_lr: of the first and the last step.
        num_steps: of them at most, at least 3; the test ends when the loss diverges.
        smoothing: see `suggest_lr`.

    Raises DsError as `suggest_lr` does, or if the range is empty.
    """
    if not 0 < min_lr < max_lr:
        raise DsError(
            f"find_lr: got a range from {min_lr} to {max_lr}, expected 0 < min_lr < max_lr"
        )
    if num_steps < 3:
        raise DsError(f"find_lr: num_steps: got {num_steps}, expected at least 3")
    before = [group["lr"] for group in optimizer.param_groups]
    originals = [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in before]
    rates: list[float] = []
    losses: list[float] = []
    diverged_at: float | None = None
    try:
        for place in range(num_steps):
            rate = min_lr * (max_lr / min_lr) ** (place / (num_steps - 1))
            _set_rates(optimizer, [rate] * len(before))
            result = step()
            loss = float(result.detach() if isinstance(result, torch.Tensor) else result)
            if not math.isfinite(loss) or (losses and _has_diverged(loss, losses)):
                diverged_at = rate
                break
            rates.append(rate)
            losses.append(loss)
    finally:
        _set_rates(optimizer, originals)
    if diverged_at is not None and len(rates) < 3:
        raise _diverged_at_once(len(rates) + 1, diverged_at)
    found = suggest_lr(rates, losses, smoothing=smoothing)
    return replace(found, diverged_at=found.diverged_at or diverged_at)


def _diverged_at_once(step: int, rate: float) -> DsError:
    return DsError(
        f"suggest_lr: the loss diverged at step {step}, at a learning rate of {rate:g}; start from "
        f"a lower one"
    )


def _has_diverged(loss: float, earlier: Iterable[float]) -> bool:
    best = min(earlier)
    # Losses may be below zero (a likelihood): then the distance to the best one must tell.
    return loss - best > (_DIVERGED - 1) * max(abs(best), 1e-12)


def _steepest(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """Where the losses fall fastest over the logarithm of the rate, by central differences."""
    slopes = []
    for place in range(1, len(lrs) - 1):
        width = math.log(lrs[place + 1]) - math.log(lrs[place - 1])
        fall = losses[place - 1] - losses[place + 1]
        slopes.append((fall / width if width > 0 else -math.inf, lrs[place]))
    return max(slopes, key=lambda slope: slope[0])[1]


def _set_rates(optimizer: Optimizer, rates: Sequence[float | torch.Tensor]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = float(rate)
