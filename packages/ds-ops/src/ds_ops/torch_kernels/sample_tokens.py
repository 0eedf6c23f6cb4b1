"""sample_tokens row by row: only what top_k and min_p leave is sorted and given random numbers."""

from __future__ import annotations

import torch

from ds_core.ops import sample_tokens as op


def sample_tokens(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    repetition: torch.Tensor | None = None,
    presence: torch.Tensor | None = None,
    frequency: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.sample_tokens.reference`."""
    settings = (seeds, positions, temperature, top_k, top_p, min_p)
    penalties = (repetition, presence, frequency, output_counts, prompt_mask)
    op.check(logits, *settings, *penalties)
    z = op.penalized(logits, *penalties)
    tokens = op.first_largest(z)
    x = op.scaled(z, temperature)
    for row, (heat, k, limit, least) in enumerate(
        zip(temperature.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True)
    ):
        if heat > 0:
            ids = _left(z[row], x[row], tokens[row], k, limit, least)
            noise = op.exponential(seeds[row : row + 1], positions[row : row + 1], ids)[0]
            score = x[row, ids] - noise.log()
            # Ids rise: of several that are the largest, the first.
            tokens[row] = ids[op.first_largest(score[None])]
    return tokens, op.log_probability(logits, tokens)


def _left(
    z: torch.Tensor, x: torch.Tensor, first: torch.Tensor, k: int, limit: float, least: float
) -> torch.Tensor:
    """The tokens of a row that may be drawn, rising; `first` is the one that always is."""
    if 0 < k < len(z):
        last = z.topk(k).values[-1]
        above = (z > last).nonzero()[:, 0]
        equal = (z == last).nonzero()[: k - len(above), 0]
        ids = torch.cat((above, equal))
    else:
        ids = torch.arange(len(z))
    largest = x[first]
    share = (x[ids] - torch.where(largest.isfinite(), largest, 0.0)).exp()
    if least > 0:
        ids, share = ids[share >= least], share[share >= least]
    if limit < 1:
        ids, position = ids.sort()
        share = share[position]
        order = z[ids].sort(descending=True, stable=True).indices
        mass = share[order].cumsum(0)
        ids = ids[order[mass - share[order] < limit * mass[-1:]]]
    return torch.cat((ids, first[None])).unique()
