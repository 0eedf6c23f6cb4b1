"""The layer of BERT's encoder, and its config."""

from __future__ import annotations

from ds_ops import TransformerLayer as DeepSpeedTransformerLayer
from ds_ops import TransformerLayerConfig as DeepSpeedTransformerConfig

__all__ = ["DeepSpeedTransformerConfig", "DeepSpeedTransformerLayer"]
