"""Training with less computation: layers that see fewer tokens, and layers that are left out."""

from ds_core.efficiency.progressive_layer_drop import ProgressiveLayerDrop, theta_at
from ds_core.efficiency.random_ltd import RandomLTD, RandomLTDObserver, convert_to_random_ltd

__all__ = [
    "ProgressiveLayerDrop",
    "RandomLTD",
    "RandomLTDObserver",
    "convert_to_random_ltd",
    "theta_at",
]
