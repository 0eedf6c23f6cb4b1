"""The ways to train a model that are compared here, each as one function `step(*batch) -> loss`.

| name | what it is |
|---|---|
| `torch` | a plain loop in one process |
| `ddp` | torch DistributedDataParallel |
| `fsdp2` | torch `fully_shard` on each block and on the rest |
| `deepspeed-1` ... `-3` | DeepSpeed's engine at a stage |
| `engine-0` ... `-3` | `ds_core.initialize` with `zero_optimization.stage` |
| `shard-1` ... `-3` | `ds_zero.shard` in a plain loop |

All use AdamW with torch's fused kernel and clip the global norm of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from original import original

LEARNING_RATE, MAX_NORM = 1e-3, 1.0
OURS = ("engine", "shard")

Dtype = Literal["fp32", "bf16"]


@dataclass
class Trainer:
    """One implementation, ready to train.

    Attributes:
        step: runs one whole step on a batch and returns its detached loss.
        ledger: counts the bytes this rank sends, if the implementation counts them.
        memory: bytes between steps by kind, as the implementation states them.
        full_state: every parameter whole, by name. Collective.
        keep: what must stay alive.
    """

    step: Callable[..., torch.Tensor]
    ledger: Any = None
    memory: Callable[[], dict[str, int]] | None = None
    full_state: Callable[[], dict[str, torch.Tensor]] | None = None
    keep: list[Any] = field(default_factory=list)


def build(name: str, model: nn.Module, *, dtype: Dtype = "fp32", micro_batch: int = 2) -> Trainer:
    """Make the implementation `name` train `model`. Collective over all ranks."""
    family, _, stage = name.partition("-")
    if family in ("torch", "ddp", "fsdp2"):
        return _BUILDERS[family](model, dtype)
    return _BUILDERS[family](model, dtype, int(stage), micro_batch)


def is_ours(name: str) -> bool:
    """Whether `name` is one of this project's."""
    return name.partition("-")[0] in OURS


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)


def _loop(model: nn.Module, optimizer: Any, *, clip: bool = True, autocast: bool = False) -> Any:
    """The plain training loop around any model and optimizer."""

    def step(*batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(*batch)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _torch(model: nn.Module, dtype: Dtype) -> Trainer:
    step = _loop(model, optimizer := _adamw(model), autocast=dtype == "bf16")
    return Trainer(step, full_state=lambda: _copied(model.state_dict()), keep=[optimizer])


def _ddp(model: nn.Module, dtype: Dtype) -> Trainer:
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = _adamw(wrapped)
    step = _loop(wrapped, optimizer, autocast=dtype == "bf16")
    return Trainer(step, full_state=lambda: _copied(model.state_dict()), keep=[wrapped, optimizer])


def _fsdp2(model: nn.Module, dtype: Dtype) -> Trainer:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if dtype == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = _adamw(model)
    return Trainer(_loop(model, optimizer), keep=[model, optimizer])


def _engine_loop(engine: Any) -> Callable[..., torch.Tensor]:
    """The loop that DeepSpeed's engine and ours have in common."""

    def step(*batch: torch.Tensor) -> torch.Tensor:
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def _config(dtype: Dtype, stage: int, micro_batch: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == "bf16"},
    }


def _deepspeed(model: nn.Module, dtype: Dtype, stage: int, micro_batch: int) -> Trainer:
    deepspeed = original()
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    config = _config(dtype, stage, micro_batch)
    config |= {"zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
    config["zero_optimization"]["overlap_comm"] = False  # needs an accelerator with streams
    engine, *_ = deepspeed.initialize(model=model, optimizer=_adamw(model), config=config)
    return Trainer(_engine_loop(engine), keep=[engine])


def _engine(model: nn.Module, dtype: Dtype, stage: int, micro_batch: int) -> Trainer:
    import ds_core
    from ds_core import comm

    mesh = comm.Mesh.world()
    config = _config(dtype, stage, micro_batch)
    engine = ds_core.initialize(model, config, optimizer=_adamw(model), mesh=mesh)
    return Trainer(
        _engine_loop(engine), mesh.ledger, engine.memory, engine.state_dict, keep=[engine]
    )


def _shard(model: nn.Module, dtype: Dtype, stage: int, micro_batch: int) -> Trainer:
    import ds_zero
    from ds_core import comm
    from ds_core.precision import Precision

    mesh = comm.Mesh.world()
    precision = Precision()
    if dtype == "bf16":
        precision = Precision(compute=torch.bfloat16, master=torch.float32)
    optimizer = ds_zero.shard(
        model,
        torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01),
        stage,
        mesh=mesh,
        precision=precision,
        max_grad_norm=MAX_NORM,
    )
    step = _loop(model, optimizer, clip=False)
    return Trainer(
        step, mesh.ledger, optimizer.memory, optimizer.full_state_dict, keep=[model, optimizer]
    )


def _copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


_BUILDERS: dict[str, Callable[..., Trainer]] = {
    "torch": _torch,
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "deepspeed": _deepspeed,
    "engine": _engine,
    "shard": _shard,
}
