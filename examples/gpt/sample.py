"""Text from a trained model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@torch.no_grad()
def generate(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_context: int,
    num_tokens: int = 96,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> str:
    """The prompt and a continuation of `num_tokens` tokens.

    Args:
        logits_of: the model: ids `[1, t]` to logits `[1, t, v]`.
        max_context: how many of the last tokens it is given.
        temperature: below 1, likelier tokens become likelier still.
        top_k: only so many of the likeliest tokens can be drawn.
        seed: of the draws; equal on all ranks, which must run the model equally often.
    """
    ids = tokenizer.encode(prompt or "\n").ids
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_tokens):
        context = torch.tensor([ids[-max_context:]], device=device)
        logits = logits_of(context)[0, -1].float().cpu()
        best = torch.topk(logits / temperature, min(top_k, logits.numel()))
        drawn = torch.multinomial(torch.softmax(best.values, 0), 1, generator=generator)
        ids.append(int(best.indices[drawn]))
    return tokenizer.decode(ids, skip_special_tokens=False)
