"""State dicts on their way to torch.save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ds_core.errors import CheckpointError


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """A copy of nested lists, tuples and dicts whose tensors have storages of their own.

    torch.save writes the whole storage of a view, such as a part of a flat buffer.

    Args:
        item: anything; what is neither a tensor nor a list, tuple or dict is kept as it is.
        device: of the copies.
    """
    if isinstance(item, torch.Tensor):
        return item.detach().to(device, copy=True)
    if isinstance(item, list):
        return [clone_tensors_for_torch_save(each, device) for each in item]
    if isinstance(item, tuple):
        return tuple(clone_tensors_for_torch_save(each, device) for each in item)
    if isinstance(item, dict):
        copies = [(key, clone_tensors_for_torch_save(value, device)) for key, value in item.items()]
        return type(item)(copies)
    return item


def get_model_ckpt_name_for_rank(base_folder: str, mp_rank_str: str) -> str:
    """Where the original keeps the model states of a model-parallel rank."""
    return str(Path(base_folder, f"mp_rank_{mp_rank_str}_model_states.pt"))


def get_zero_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """Where the original keeps the optimizer's shard of a rank."""
    name = f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt"
    return str(Path(base_folder, name))


def get_layer_ckpt_name_for_rank(base_folder: str, layer_id: int, tp_rank: int) -> str:
    """Where the original keeps a pipeline's layer."""
    if layer_id < 0 or tp_rank < 0:
        raise CheckpointError(f"layer {layer_id}, rank {tp_rank}: expected numbers from 0 on")
    return str(Path(base_folder, f"{layer_id}-model_{tp_rank:02d}-model_states.pt"))
