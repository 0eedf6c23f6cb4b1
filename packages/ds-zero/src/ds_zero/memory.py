"""How many bytes ZeRO holds per rank, by closed formula, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ds_zero.errors import ShardError
from ds_zero.holdings import KINDS
from ds_zero.offload.choice import Offload, Tier

#: Bytes per element that an optimizer keeps beside the parameters: in fp32, but for those that
#: say otherwise.
_STATE_BYTES = {
    "adam": 8,
    "adamw": 8,
    "adam-bf16": 4,
    "adamw-bf16": 4,
    "adam8bit": 2,
    "sgd": 0,
    "sgd-momentum": 4,
    "adagrad": 4,
    "rmsprop": 4,
}
#: Adam8bit keeps two scales of 4 bytes for each block of so many elements.
_BLOCK = 256


def estimate_memory(
    model: nn.Module | int,
    *,
    stage: int,
    world_size: int,
    dtype: torch.dtype = torch.bfloat16,
    grad_dtype: torch.dtype | None = None,
    master: bool = True,
    optimizer: str = "adamw",
    largest_unit: int | None = None,
    offload: Offload | None = None,
    update_in_backward: bool = False,
) -> Mapping[str, int]:
    """Bytes per rank of parameters, gradients, master copy and optimizer state; and their total.

    With P parameters of 2 bytes and fp32 Adam: 16 P at stage 0, 4 P + 12 P/N at 1, 2 P + 14 P/N
    at 2, 16 P/N at 3; without a master copy 4 of the 12 less, with 8-bit states 5.97 less. Padding
    (under 64 bytes per parameter and rank) and activations are not included; "transient" is what
    stage 3 holds beside its shards while it computes: two units and their gradients.

    Args:
        model: a module (on any device, "meta" included) or its number of parameters.
        stage: 0 to 3.
        world_size: ranks that share the model.
        dtype: of parameters; below fp32 a master copy in fp32 is counted, unless `master` is false.
        grad_dtype: in which gradients accumulate; default: `dtype`.
        master: False: parameters are updated in place, as with bf16 and stochastic rounding.
        optimizer: one of adam, adamw, adam-bf16, adamw-bf16 (states in bf16), adam8bit, sgd,
            sgd-momentum, adagrad, rmsprop.
        largest_unit: parameters of the largest unit; default: found from the model, else 0.
        offload: what leaves the device: of that, "host" and "disk" say where it is, and
            "persistent" counts what stays on the device. `memory_plan` is the exact account.
        update_in_backward: no gradient outlives its unit's turn.

    Raises ShardError for a stage, world size or optimizer that makes no sense.
    Source: Rajbhandari et al. 2020, section 5 and table 1.
    """
    if stage not in (0, 1, 2, 3):
        raise ShardError(f"stage: got {stage!r}, expected one of 0, 1, 2, 3")
    if world_size < 1:
        raise ShardError(f"world_size: got {world_size}, expected at least 1")
    if optimizer not in _STATE_BYTES:
        raise ShardError(
            f"optimizer: got {optimizer!r}, expected one of {', '.join(sorted(_STATE_BYTES))}"
        )
    numel = model if isinstance(model, int) else sum(p.numel() for p in model.parameters())
    if largest_unit is None:
        largest_unit = 0 if isinstance(model, int) else _largest_unit(model)
    own = -(-numel // world_size)
    offload = offload or Offload()
    # Of gradients that go to the host only this rank's part does.
    cut = stage >= 2 or offload.optimizer != "device"
    stepped = own if stage >= 1 else numel
    scales = 8 * -(-stepped // _BLOCK) if optimizer == "adam8bit" else 0
    parts = {
        "parameters": (own if stage == 3 else numel) * dtype.itemsize,
        "gradients": (own if cut else numel) * (grad_dtype or dtype).itemsize,
        "master": stepped * (4 if master and dtype.itemsize < 4 else 0),
        "optimizer": stepped * _STATE_BYTES[optimizer] + scales,
    }
    if update_in_backward:
        parts["gradients"] = 0
    away = _leaving(parts, own, stage, offload)
    parts["host"], parts["disk"] = away["cpu"], away["nvme"]
    parts["persistent"] = sum(parts[kind] for kind in KINDS) - parts["host"] - parts["disk"]
    parts["transient"] = 4 * largest_unit * dtype.itemsize if stage == 3 else 0
    parts["total"] = parts["persistent"] + parts["transient"]
    return parts


def _leaving(parts: dict[str, int], own: int, stage: int, offload: Offload) -> dict[Tier, int]:
    """Bytes that live on the host ("cpu") and on disk ("nvme"); what crosses needs a master copy.

    Gradients go to the host with either, and the step is there.
    """
    if stage == 0 and (offload.optimizer, offload.parameters) != ("device", "device"):
        raise ShardError("offload: got stage 0, where nothing is sharded; use 1, 2 or 3")
    offload.check_stage(stage)
    away: dict[Tier, int] = {"device": 0, "cpu": 0, "nvme": 0}
    if offload.optimizer != "device":
        ratio = 1.0 if offload.ratio == "auto" else offload.ratio
        parts["master"] = max(parts["master"], int(4 * own * ratio))
        away[offload.optimizer] += int(ratio * (parts["master"] + parts["optimizer"]))
        away["cpu"] += int(ratio * parts["gradients"])
    away[offload.parameters] += parts["parameters"]
    return away


def _largest_unit(model: nn.Module) -> int:
    from ds_zero.plan import ParamSpec, plan_units

    specs = [ParamSpec(name, param, 0) for name, param in model.named_parameters()]
    units = plan_units(model, specs)
    return max(sum(spec.param.numel() for spec in unit.params) for unit in units)
