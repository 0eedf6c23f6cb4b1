"""Loss on held-out text: the same figure on any number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from model import IGNORED
from text import Windows

from ds_core import Engine, comm

WINDOWS_PER_FORWARD = 8


@dataclass(frozen=True)
class HeldOut:
    """How well held-out text is predicted, in two units: the second compares across tokenizers."""

    nats_per_token: float
    bits_per_byte: float

    def __str__(self) -> str:
        return f"{self.nats_per_token:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte"


@torch.no_grad()
def evaluate(
    engine: Engine, windows: Windows, bytes_of: torch.Tensor, *, max_windows: int
) -> HeldOut:
    """Mean loss over up to `max_windows` windows, spread evenly over the text.

    bytes_of: bytes of text of each token id. Collective: ranks share the windows, and run the
    model equally often, because at stage 3 they need one another's parameters for it.
    """
    group = engine.mesh.group("dp")
    count = min(max_windows, len(windows))
    chosen = [index * len(windows) // count for index in range(count)]
    per_step = WINDOWS_PER_FORWARD * group.size
    totals = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    was_training = engine.training
    engine.eval()
    for start in range(0, count, per_step):
        mine = chosen[start : start + per_step][group.rank :: group.size]
        totals += _totals(engine, windows, mine, bytes_of)
    engine.train(was_training)
    parts = comm.all_gather_object(totals.tolist(), group, caller="evaluate")
    nats, num_tokens, num_bytes = map(sum, zip(*parts, strict=True))
    return HeldOut(nats / num_tokens, nats / math.log(2) / num_bytes)


def _totals(
    engine: Engine, windows: Windows, chosen: list[int], bytes_of: torch.Tensor
) -> torch.Tensor:
    """Summed loss in nats, tokens and bytes of some windows; of one that does not count if none."""
    pairs = [windows[index] for index in chosen]
    if not pairs:
        tokens, targets = windows[0]
        pairs = [(tokens, torch.full_like(targets, IGNORED))]
    tokens, targets = (torch.stack(side).to(engine.device) for side in zip(*pairs, strict=True))
    logits = engine(tokens)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    counted = targets[targets != IGNORED].cpu()
    sums = [losses.double().sum().item(), counted.numel(), bytes_of[counted].sum().item()]
    return torch.tensor(sums, dtype=torch.float64)
