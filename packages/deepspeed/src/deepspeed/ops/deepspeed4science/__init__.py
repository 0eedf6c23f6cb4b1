"""Attention with the biases of AlphaFold's Evoformer."""

from __future__ import annotations

from deepspeed._names import names_of

_HOME = "deepspeed.ops.deepspeed4science.evoformer_attn"

__getattr__, __dir__ = names_of(
    __name__,
    {"DS4Sci_EvoformerAttention": f"{_HOME}:DS4Sci_EvoformerAttention"},
    submodules=("evoformer_attn",),
    missing={"EvoformerFusedAttention": "use DS4Sci_EvoformerAttention, which is differentiable"},
)
