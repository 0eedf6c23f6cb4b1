"""A transformer's sizes from a Hugging Face `config.json`; transformers need not be installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_core.errors import PlanError
from ds_core.planning.transformer import TransformerShape

#: Decoders with RMSNorm, rotary positions and a gated network.
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_KNOWN = (*_LLAMA_LIKE, "gpt2", "bert")


def read_hf_config(path: Path) -> TransformerShape:
    """The sizes that a `config.json` describes.

    Raises PlanError if it is no such file, or of a kind of model that is not known here.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"--model: {path} is not a readable JSON file: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in _KNOWN:
        raise PlanError(
            f"--model: {path}: model_type: got {kind!r}, expected one of {', '.join(_KNOWN)}; for "
            f"another model give a function that builds it, FILE.py:FUNCTION"
        )
    read = {"gpt2": _gpt2, "bert": _bert}.get(kind, _llama)
    try:
        shape = read(values)
    except ZeroDivisionError:
        raise PlanError(f"--model: {path}: got 0 attention heads, expected at least 1") from None
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"--model: {path}: key {error} is missing or no number") from error
    for name in ("layers", "hidden", "intermediate", "vocab", "heads", "kv_heads", "head_width"):
        if getattr(shape, name) < 1:
            raise PlanError(
                f"--model: {path}: {name}: got {getattr(shape, name)}, expected at least 1"
            )
    return shape


def _llama(values: Mapping[str, Any]) -> TransformerShape:
    kind = values["model_type"]
    hidden, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
    bias = bool(values.get("attention_bias", False))
    return TransformerShape(
        layers=int(values["num_hidden_layers"]),
        hidden=hidden,
        intermediate=int(values["intermediate_size"]),
        vocab=int(values["vocab_size"]),
        heads=heads,
        kv_heads=int(values.get("num_key_value_heads") or heads),
        head_width=int(values.get("head_dim") or hidden // heads),
        is_tied=bool(values.get("tie_word_embeddings", False)),
        has_qkv_bias=kind == "qwen2" or bias,
        has_qk_norm=kind == "qwen3",
    )


def _gpt2(values: Mapping[str, Any]) -> TransformerShape:
    hidden, heads = int(values["n_embd"]), int(values["n_head"])
    return TransformerShape(
        layers=int(values["n_layer"]),
        hidden=hidden,
        intermediate=int(values.get("n_inner") or 4 * hidden),
        vocab=int(values["vocab_size"]),
        heads=heads,
        kv_heads=heads,
        head_width=hidden // heads,
        positions=int(values.get("n_positions", 1024)),
        is_gated=False,
        is_tied=bool(values.get("tie_word_embeddings", True)),
        has_bias=True,
        norm_tensors=2,
    )


def _bert(values: Mapping[str, Any]) -> TransformerShape:
    hidden, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
    names = " ".join(values.get("architectures") or ["BertModel"])
    return TransformerShape(
        layers=int(values["num_hidden_layers"]),
        hidden=hidden,
        intermediate=int(values["intermediate_size"]),
        vocab=int(values["vocab_size"]),
        heads=heads,
        kv_heads=heads,
        head_width=hidden // heads,
        positions=int(values.get("max_position_embeddings", 512)),
        is_gated=False,
        is_causal=False,
        is_tied=True,
        has_bias=True,
        norm_tensors=2,
        token_types=int(values.get("type_vocab_size", 2)),
        head_kind="mlm" if "MaskedLM" in names else "pooler",
    )
