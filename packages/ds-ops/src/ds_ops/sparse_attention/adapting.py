"""`SparseAttentionUtils`: models that were trained with dense attention, and their inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from ds_core.errors import ConfigError
from ds_ops.sparse_attention.bert import TransformersSelfAttention
from ds_ops.sparse_attention.layouts import SparsityConfig

_Model = TypeVar("_Model", bound=nn.Module)
#: Rows of the table of positions in front of the first token's, by kind of model.
_RESERVED = {"bert": 0, "roberta": 2}


class SparseAttentionUtils:
    """What it takes to give a BERT or RoBERTa of transformers block-sparse attention."""

    @staticmethod
    def extend_position_embedding(model: _Model, max_position: int) -> _Model:
        """The model, with positions for longer sequences: those that it has, over and over.

        Args:
            model: with `bert` or `roberta` in it.
            max_position: tokens of the longest sequences; more than it has positions for.

        Raises ConfigError for other models, and for lengths that it has positions for already.
        """
        kind, config, inner = _inner(model)
        reserved = _RESERVED[kind]
        embeddings = inner.embeddings
        table = embeddings.position_embeddings
        first, old = table.weight.data[:reserved], table.weight.data[reserved:]
        if max_position <= len(old):
            raise ConfigError(
                f"extend_position_embedding: max_position: got {max_position}, expected more than "
                f"the model's {len(old)} positions"
            )
        times = -(-max_position // len(old))
        weight = torch.cat([first, old.repeat(times, 1)[:max_position]])
        table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        table.num_embeddings = len(weight)
        for name, buffer in list(embeddings.named_buffers(recurse=False)):
            if name == "position_ids":
                longer = torch.arange(len(weight), device=buffer.device, dtype=buffer.dtype)
                embeddings.position_ids = longer.expand(1, -1)
            elif name == "token_type_ids":
                embeddings.token_type_ids = buffer.new_zeros(1, len(weight))
        config.max_position_embeddings = len(weight)
        return model

    @staticmethod
    def update_tokenizer_model_max_length(tokenizer: Any, max_position: int) -> Any:
        """The tokenizer, which cuts what is longer than `max_position` tokens, now and saved."""
        tokenizer.model_max_length = max_position
        tokenizer.init_kwargs["model_max_length"] = max_position
        return tokenizer

    @staticmethod
    def replace_model_self_attention_with_sparse_self_attention(
        model: _Model, max_position: int, sparsity_config: SparsityConfig | None = None
    ) -> _Model:
        """The model, with sparse self attention in all layers; parameters keep their names.

        Args:
            model: an encoder with `bert` or `roberta` in it.
            max_position: tokens of the longest sequences.
            sparsity_config: the layout; None: `FixedSparsityConfig` for the model's heads.

        Raises ConfigError for other models, decoders, and layouts that do not fit.
        """
        kind, config, inner = _inner(model)
        config.max_position_embeddings = max_position + _RESERVED[kind]
        SparseAttentionUtils.replace_self_attention_layer_with_sparse_self_attention_layer(
            config, inner.encoder.layer, sparsity_config, max_position
        )
        return model

    @staticmethod
    def replace_self_attention_layer_with_sparse_self_attention_layer(
        config: Any,
        layers: Iterable[Any],
        sparsity_config: SparsityConfig | None = None,
        max_position: int = 2048,
    ) -> Iterable[Any]:
        """The layers, each with `attention.self` replaced; arguments as above."""
        if getattr(config, "is_decoder", False):
            raise ConfigError(
                "sparse self attention: the model is a decoder, which keeps keys in a cache; "
                "expected an encoder"
            )
        for layer in layers:
            layer.attention.self = TransformersSelfAttention(
                config, sparsity_config, max_position, layer.attention.self
            ).to(layer.attention.self.query.weight.device)
        return layers

    @staticmethod
    def pad_to_block_size(
        block_size: int,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pad_token_id: int,
        model_embeddings: nn.Module | None,
    ) -> tuple[int, *tuple[torch.Tensor | None, ...]]:
        """A model's inputs, padded behind so that blocks divide their length.

        Args:
            block_size: of the layout.
            input_ids: `[batch, tokens]`; or None, and `inputs_embeds`, `[batch, tokens, hidden]`.
            attention_mask: `[batch, tokens]`, 0 for what is not seen, as padding is; None: only
                padding is not seen.
            token_type_ids: padded with 0.
            position_ids: padded with `pad_token_id`.
            model_embeddings: makes embeddings of padding, where there are `inputs_embeds`.

        Returns how many tokens were added, `input_ids`, `attention_mask`, `token_type_ids`,
        `position_ids` and `inputs_embeds`, each None if it was, but the mask of what was padded.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ConfigError("pad_to_block_size: input_ids: got None, as are inputs_embeds")
        batch, length = given.shape[:2]
        added = -length % block_size
        if added:
            if attention_mask is None:
                attention_mask = torch.ones(batch, length, dtype=torch.long, device=given.device)
            if inputs_embeds is not None:
                if model_embeddings is None:
                    raise ConfigError("pad_to_block_size: model_embeddings: got None")
                padding = inputs_embeds.new_full((batch, added), pad_token_id, dtype=torch.long)
                inputs_embeds = torch.cat([inputs_embeds, model_embeddings(padding)], dim=1)
            input_ids = _padded(input_ids, added, pad_token_id)
            position_ids = _padded(position_ids, added, pad_token_id)
            attention_mask = _padded(attention_mask, added, 0)
            token_type_ids = _padded(token_type_ids, added, 0)
        return added, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds

    @staticmethod
    def unpad_sequence_output(pad_len: int, sequence_output: torch.Tensor) -> torch.Tensor:
        """A result, `[batch, tokens, ...]`, without the last `pad_len` tokens."""
        return sequence_output[:, :-pad_len] if pad_len > 0 else sequence_output


def _inner(model: Any) -> tuple[str, Any, Any]:
    """The kind of a model, its config, and the part of it that holds embeddings and encoder."""
    for kind in _RESERVED:
        found = getattr(model, kind, None)
        if found is not None:
            return kind, model.config, found
    raise ConfigError(
        f"{type(model).__name__}: expected a model with one of {', '.join(_RESERVED)} in it, such "
        f"as BertForMaskedLM; in others, put SparseSelfAttention into the layers yourself"
    )


def _padded(t: torch.Tensor | None, added: int, value: int) -> torch.Tensor | None:
    return None if t is None else functional.pad(t, (0, added), value=value)
