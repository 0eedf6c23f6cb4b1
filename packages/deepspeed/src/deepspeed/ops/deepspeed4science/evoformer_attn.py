"""`ds_ops.evoformer_attention` with the arguments of the original."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepspeed._names import names_of
from ds_core.errors import OpError
from ds_ops import evoformer_attention

__getattr__, __dir__ = names_of(
    __name__,
    {},
    missing=dict.fromkeys(
        ("EvoformerFusedAttention", "attention_bwd"),
        "use DS4Sci_EvoformerAttention, which is differentiable",
    ),
)


def DS4Sci_EvoformerAttention(  # noqa: N802 - the name programs call
    Q: torch.Tensor,  # noqa: N803
    K: torch.Tensor,  # noqa: N803
    V: torch.Tensor,  # noqa: N803
    biases: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """`softmax(Q K^T / sqrt(d) + bias1 + bias2) V`, as `ds_ops.evoformer_attention`.

    Q, K, V: `[batch, N_seq, N_res, heads, d]`, or `[..., N_res, heads, d]` without biases. biases:
    none to two of bias1 `[batch, N_seq, 1, 1, N_res]` and bias2 `[batch, 1, heads, N_res, N_res]`,
    or None; the list stays as it is. Unlike the original it takes fp32, tensors on a CPU and fewer
    than 17 residues. Raises OpError for what does not fit.
    """
    if len(biases) > 2:
        raise OpError(
            f"DS4Sci_EvoformerAttention: biases: got {len(biases)}, expected at most two: bias1 "
            "and bias2"
        )
    bias1, bias2 = (*biases, None, None)[:2]
    if bias1 is not None or bias2 is not None or Q.dim() < 3:
        return evoformer_attention(Q, K, V, bias1, bias2)
    # Without biases all that comes before the residues is alike.
    flat = (t.reshape(1, -1, *t.shape[-3:]) for t in (Q, K, V))
    return evoformer_attention(*flat).view(Q.shape)


__all__ = ["DS4Sci_EvoformerAttention"]
