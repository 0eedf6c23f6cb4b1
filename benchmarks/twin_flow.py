"""Twin-Flow: how long a step of the optimizer takes, by the share of it that leaves the device.

On a machine without an accelerator the two sides are two threads on two cores: the caller's, which
plays the device, and the host's. What is timed is `update`, the step itself, of all ratios in turn;
"auto" has found its ratio before. A step of one side alone is that of ratio 0, or 1.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from torch import nn

import ds_zero
from ds_core import optimizers
from offload_trial import Adam
from ranks import Ranks
from report import Check, Report, main, median

RATIOS = (0.0, 0.125, 0.25, 0.375, 0.4375, 0.5, 0.5625, 0.625, 0.75, 0.875, 1.0)
AUTO: Literal["auto"] = "auto"
UNITS, WIDTH = 32, 512
#: Steps in which "auto" measures, chooses and moves.
SETTLING = 10
#: "auto" over the best ratio of the sweep, at most.
LIMIT = 1.05


class Worker:
    """Steps one model under every ratio, in one process."""

    def __init__(self, rank: int, world_size: int, width: int) -> None:
        self._x = torch.randn(4, width)
        self._pairs = {ratio: self._built(ratio, width) for ratio in (*RATIOS, AUTO)}
        for ratio in self._pairs:
            for _ in range(SETTLING):
                self.step(ratio)

    @staticmethod
    def _built(ratio: Any, width: int) -> tuple[nn.Module, ds_zero.ZeroOptimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(UNITS)))
        optimizer = optimizers.build(Adam(lr=1e-4), list(model.named_parameters()), on_host=True)
        offload = ds_zero.Offload(optimizer="cpu", ratio=ratio)
        units = list(model)
        return model, ds_zero.shard(model, optimizer, 2, units=units, offload=offload)

    def step(self, ratio: Any) -> float:
        """Seconds of one update."""
        model, optimizer = self._pairs[ratio]
        model(self._x).square().mean().backward()
        optimizer.grad_norm()
        begin = time.perf_counter()
        optimizer.update()
        seconds = time.perf_counter() - begin
        optimizer.zero_grad()
        return seconds

    def turn(self) -> dict[Any, float]:
        """Seconds of one update under each ratio."""
        return {ratio: self.step(ratio) for ratio in self._pairs}

    def share(self) -> float:
        """What "auto" has found."""
        return self._pairs[AUTO][1].host_ratio


def run(quick: bool = False) -> Report:
    """The sweep, and what "auto" makes of it."""
    turns = 15 if quick else 60
    ranks = Ranks(1, Worker, WIDTH // 2 if quick else WIDTH)
    try:
        found = [ranks.ask("turn")[0] for _ in range(turns)]
        share = ranks.ask("share")[0]
    finally:
        ranks.close()
    times = {ratio: median([turn[ratio] for turn in found]) for ratio in found[0]}
    best = min(RATIOS, key=lambda ratio: times[ratio])
    report = Report(
        "twin_flow",
        "Twin-Flow: a step of the optimizer by the share that the host takes",
        ["ratio", "step", "step / best of the sweep"],
    )
    for ratio, seconds in times.items():
        name = f"auto: {share:.3f}" if ratio == AUTO else f"{ratio:.4g}"
        report.rows.append([name, f"{seconds * 1e3:.2f} ms", f"{seconds / times[best]:.3f}"])
    quotient = median([turn[AUTO] / turn[best] for turn in found])
    report.checks.append(Check(f"auto / best swept ({best:.4g})", quotient, LIMIT))
    report.notes.append(
        "Two threads of one process, one core each; the quotient is the median over turns of that "
        "within a turn. Means something on a quiet machine with two free cores only."
    )
    report.raw = {"seconds": {str(ratio): s for ratio, s in times.items()}, "auto": share}
    return report


if __name__ == "__main__":
    main(run)
