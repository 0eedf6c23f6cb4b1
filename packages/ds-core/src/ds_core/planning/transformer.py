"""A transformer by its sizes: parameters, floating-point operations and activations.

Shapes in formulas: b samples, s tokens, L layers, h width, i width of the feed-forward network,
a heads, g key-value heads, k width of a head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """Sizes of a decoder or encoder.

    Attributes:
        layers, hidden, intermediate, vocab: L, h, i, V.
        heads, kv_heads, head_width: a, g, k.
        positions: learned positions; 0 for rotary or none.
        is_gated: whether the feed-forward network has a gate (SwiGLU): three matrices, not two.
        is_causal: whether a token sees only those before it.
        is_tied: whether the output layer is the embedding.
        has_bias: whether every linear layer has one.
        has_qkv_bias: whether those of query, key and value have one.
        norm_tensors: tensors of one normalization: 1 for RMSNorm, 2 for LayerNorm.
        has_qk_norm: whether queries and keys are normalized per head.
        token_types: rows of a table of segment embeddings.
        head_kind: what follows the last layer: "lm", "mlm", "pooler" or "none".
    """

    layers: int
    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_width: int
    positions: int = 0
    is_gated: bool = True
    is_causal: bool = True
    is_tied: bool = False
    has_bias: bool = False
    has_qkv_bias: bool = False
    norm_tensors: int = 1
    has_qk_norm: bool = False
    token_types: int = 0
    head_kind: str = "lm"

    def build(self) -> nn.Module:
        """A module on the meta device with these parameters; it cannot be called."""
        with torch.device("meta"):
            return _build(self)

    def flops_per_sample(self, tokens: int, matrix_params: int) -> float:
        """Operations of one sample's forward and backward: 6 N s + attention's.

        Attention multiplies s x s twice per layer: 12 L a k s^2, half of it if causal.

        Args:
            tokens: s.
            matrix_params: N, parameters that every token is multiplied by: all of them but the
                embedding tables (an output layer tied to one counts).

        Source: Kaplan et al. 2020, "Scaling laws for neural language models", section 2.1;
        Narayanan et al. 2021, "Efficient large-scale language model training", appendix.
        """
        attention = 12 * self.layers * self.heads * self.head_width * tokens**2
        return 6.0 * matrix_params * tokens + attention * (0.5 if self.is_causal else 1.0)

    def matrix_params(self) -> int:
        """Parameters that every token is multiplied by."""
        attention = self.hidden * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        network = (3 if self.is_gated else 2) * self.hidden * self.intermediate
        output = self.hidden * self.vocab if self.head_kind in ("lm", "mlm") else 0
        return self.layers * (attention + network) + output

    def layer_activation_bytes(self, itemsize: int) -> float:
        """Bytes that one layer saves for backward per token, with a fused attention.

        Per normalization its input (h) and output (h), which the matrices after it save; query
        (ak), key and value (gk each); attention's output (ak) and its log-sums in fp32 (a); and
        of the network its hidden values: 4 i with a gate, 2 i without.

        Source: counted after Korthikanti et al. 2022, "Reducing activation recomputation in large
        transformer models", section 4.1, without the s x s terms, which fused attention does not
        keep, and without dropout.
        """
        query, key_value = self.heads * self.head_width, self.kv_heads * self.head_width
        # Attention's output is saved by attention, and again where its layout has to change.
        values = 4 * self.hidden + 3 * query + 2 * key_value
        values += (4 if self.is_gated else 2) * self.intermediate
        return values * itemsize + 4 * self.heads

    def activation_bytes(
        self, samples: int, tokens: int, itemsize: int, *, recompute: bool = False
    ) -> int:
        """Bytes saved for backward by one micro-batch.

        With recomputation every layer keeps its input only, and one layer at a time is whole.
        The output layer keeps its logits once in the model's format and, for the loss, twice in
        fp32 (a copy and the log-softmax).
        """
        layer = self.layer_activation_bytes(itemsize)
        kept = self.layers * self.hidden * itemsize + layer if recompute else self.layers * layer
        ends = 2 * self.hidden * itemsize
        if self.head_kind in ("lm", "mlm"):
            ends += self.vocab * (itemsize + 8 if itemsize < 4 else 8)
        return round(samples * tokens * (kept + ends))


def guess_shape(numel: int) -> TransformerShape:
    """A plausible decoder of about that many parameters: width 128 times its depth.

    For activations and operations only; `numel` = 12 L h^2 then.
    """
    depth = max(1, round((numel / (12 * 128**2)) ** (1 / 3)))
    width = max(1, round((numel / (12 * depth)) ** 0.5))
    heads = max(1, round(width / 128))
    return TransformerShape(
        layers=depth,
        hidden=width,
        intermediate=4 * width,
        vocab=min(32_000, max(1, numel // max(1, 8 * width))),
        heads=heads,
        kv_heads=heads,
        head_width=max(1, width // heads),
        is_gated=False,
        head_kind="lm",
    )


def _build(shape: TransformerShape) -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(shape.vocab, shape.hidden)
    if shape.positions:
        model.positions = nn.Embedding(shape.positions, shape.hidden)
    if shape.token_types:
        model.token_types = nn.Embedding(shape.token_types, shape.hidden)
        model.embed_norm = _norm(shape)
    model.layers = nn.ModuleList(_layer(shape) for _ in range(shape.layers))
    if not shape.token_types:
        model.norm = _norm(shape)
    _add_head(model, shape)
    return model


def _layer(shape: TransformerShape) -> nn.Module:
    query, key_value = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    qkv_bias = shape.has_bias or shape.has_qkv_bias
    layer = nn.Module()
    layer.attention_norm = _norm(shape)
    layer.query = nn.Linear(shape.hidden, query, bias=qkv_bias)
    layer.key = nn.Linear(shape.hidden, key_value, bias=qkv_bias)
    layer.value = nn.Linear(shape.hidden, key_value, bias=qkv_bias)
    if shape.has_qk_norm:
        layer.query_norm = nn.RMSNorm(shape.head_width)
        layer.key_norm = nn.RMSNorm(shape.head_width)
    layer.out = nn.Linear(query, shape.hidden, bias=shape.has_bias)
    layer.network_norm = _norm(shape)
    if shape.is_gated:
        layer.gate = nn.Linear(shape.hidden, shape.intermediate, bias=shape.has_bias)
    layer.up = nn.Linear(shape.hidden, shape.intermediate, bias=shape.has_bias)
    layer.down = nn.Linear(shape.intermediate, shape.hidden, bias=shape.has_bias)
    return layer


def _norm(shape: TransformerShape) -> nn.Module:
    return nn.RMSNorm(shape.hidden) if shape.norm_tensors == 1 else nn.LayerNorm(shape.hidden)


def _add_head(model: nn.Module, shape: TransformerShape) -> None:
    if shape.head_kind == "pooler":
        model.pooler = nn.Linear(shape.hidden, shape.hidden)
        return
    if shape.head_kind == "none":
        return
    if shape.head_kind == "mlm":
        model.transform = nn.Linear(shape.hidden, shape.hidden)
        model.transform_norm = _norm(shape)
    output = nn.Linear(shape.hidden, shape.vocab, bias=shape.head_kind == "mlm")
    if shape.is_tied:
        output.weight = model.get_submodule("embed").get_parameter("weight")
    model.output = output
