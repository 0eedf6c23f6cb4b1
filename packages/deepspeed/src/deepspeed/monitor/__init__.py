"""Figures to TensorBoard, CSV files, Weights & Biases and Comet, on ds_core.observers."""

from __future__ import annotations

from deepspeed._names import names_of

__getattr__, __dir__ = names_of(__name__, {}, submodules=("config", "monitor"))
