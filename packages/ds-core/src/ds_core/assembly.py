"""`initialize`: one config and a model become an engine."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from ds_core import accelerator, comm, communication, logs, lr_schedules, optimizers, plugins
from ds_core import config as configuration
from ds_core.accelerator import Accelerator
from ds_core.alone import Alone
from ds_core.cast_gradients import CastGradients
from ds_core.checks import check_model, check_optimizer
from ds_core.config import low_precision
from ds_core.data import build_loader
from ds_core.decisions import decisions
from ds_core.engine import Engine
from ds_core.errors import ConfigError, DsError
from ds_core.observers import standard_observers
from ds_core.optimizers import NoOptimizer
from ds_core.precision import LossScale, Precision
from ds_core.replicated import Replicated
from ds_core.seams import Dense, Observer, Sharding

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def initialize(
    model: nn.Module,
    config: Mapping[str, Any] | str | os.PathLike[str] | configuration.Config,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: Any = None,
    training_data: Dataset[Any] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    mesh: comm.Mesh | None = None,
    observers: tuple[Observer, ...] = (),
    param_groups: Iterable[dict[str, Any]] | None = None,
    training: bool = True,
) -> Engine:
    """Assemble an `Engine` from a model and a config.

    Args:
        model: moved to this process's device, unless it was built sharded.
        config: a path of a JSON file, its content as a dict, or a loaded `Config`.
        optimizer: on the model's parameters; default: the one that the config names.
        lr_scheduler: one on `optimizer`, or a callable that makes it from an optimizer; default:
            the one that the config names, or none.
        training_data: a map-style dataset; the engine's `dataloader` then yields micro-batches.
        collate_fn: for that loader.
        mesh: the ranks and their axes; default: all ranks along "dp".
        observers: beside those that the config asks for.
        param_groups: as torch.optim takes them, for the optimizer that the config names: groups
            with hyperparameters of their own. Default: one group of all that is trained.
        training: if False, the engine only runs the model: there is no optimizer, nothing is
            trained until it is closed, and no master copy or gradient is ever allocated. What the
            config says of an optimizer and a schedule is not used.

    Raises ConfigError for a config that cannot be honoured, DsError if there is no optimizer, or if
    model and optimizer cannot be trained together.
    Collective; starts the process group if none runs.
    """
    check_model(model, trains=training)
    comm.init()
    mesh = comm.Mesh.world() if mesh is None else mesh
    data_ranks = mesh.size("dp")
    if not isinstance(config, configuration.Config):
        config = configuration.load(config, world_size=data_ranks)
    communication.apply(config.section("comm"), mesh)
    device_kind = accelerator.current()
    if config.seed is not None:
        random.seed(config.seed)
        torch.manual_seed(config.seed)
    if config.log_level is not None:
        packages = {"ds_core", *(name.partition(".")[0] for name in _plugin_modules())}
        logs.show(config.log_level, packages, rank=dist.get_rank())
    precision, reason = _precision(config, device_kind)
    _place(model, device_kind.device())
    frozen: tuple[nn.Parameter, ...] = ()
    if training:
        optimizer = _optimizer(model, config, optimizer, precision, param_groups)
        check_optimizer(model, optimizer)
    else:
        optimizer, precision, frozen = NoOptimizer(), precision.for_inference(), _freeze(model)
    sharding = _sharding(config, model, optimizer, mesh, precision)
    _broadcast_buffers(model, mesh.group("dp"))
    _cast_statistics(model, precision.compute)
    runner = _provided("runners", config, model=model, mesh=mesh)
    scheduler = _scheduler(config, lr_scheduler, sharding, optimizer) if training else None
    dp = mesh.group("dp")
    loader = None
    if training_data is not None:
        loader = build_loader(
            config, training_data, collate_fn=collate_fn, rank=dp.rank, num_ranks=dp.size
        )
    observers = (*_observers(config), *observers)
    decided = {}
    if observers:
        decided = decisions(
            config,
            mesh=mesh,
            device=device_kind.device(),
            precision=precision,
            reason=reason,
            sharding=sharding,
            optimizer=optimizer,
            scheduler=scheduler,
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        )
    engine = Engine(
        model,
        sharding,
        mesh=mesh,
        precision=precision,
        accumulation=config.gradient_accumulation_steps,
        managed_accumulation=config.managed_gradient_accumulation,
        micro_batch_size=config.train_micro_batch_size_per_gpu,
        max_grad_norm=config.gradient_clipping,
        # A sum over ranks is the average, of losses that count for as many times as much.
        loss_weight=float(data_ranks) if config.gradient_allreduce_op == "sum" else 1.0,
        lr_scheduler=scheduler,
        runner=runner,
        observers=observers,
        dataloader=loader,
        device=device_kind.device(),
        decisions=decided,
        saving=config.checkpoint.policy(),
        frozen=frozen,
        trains=training,
    )
    if config.compile.enabled:
        engine.compile(backend=config.compile.backend, **config.compile.kwargs)
    return engine


def _sharding(
    config: configuration.Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: comm.Mesh,
    precision: Precision,
) -> Sharding:
    """Whatever a section of the config asks for; else every rank holds everything."""
    transport = _provided("transports", config, mesh=mesh) or Dense()
    if config.communication_data_type is not None:
        transport = CastGradients(transport, _DTYPES[config.communication_data_type])
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "mesh": mesh}
    parts["precision"] = precision
    found: Sharding | None = _provided("sharding", config, transport=transport, **parts)
    sparse = config.sparse_gradients
    if found is not None and sparse:
        raise ConfigError(
            "sparse_gradients: got true, but gradients are sharded: a flat shard has no rows; set "
            "zero_optimization.stage to 0, or make embeddings with nn.Embedding(sparse=False)"
        )
    if found is not None:
        if found.updates_in_backward and (config.gradient_clipping or precision.loss_scale):
            key = "gradient_clipping" if config.gradient_clipping else "fp16"
            raise ConfigError(
                f"{key}: gradients cannot be scaled any more after backward has taken the step "
                f"(update_in_backward of the sharding section); remove one of them"
            )
        return found
    # Gradients that accumulate in another dtype than their own need a buffer beside autograd's.
    if mesh.size("dp") == 1 and precision.grad in (None, precision.compute):
        return Alone(sparse=sparse, **parts)
    return Replicated(transport=transport, sparse=sparse, **parts)


def _precision(config: configuration.Config, device: Accelerator) -> tuple[Precision, str]:
    formats = config.resolve_precision(
        bf16_is_fast=device.computes_fast(torch.bfloat16),
        fp16_is_fast=device.computes_fast(torch.float16),
    )
    names = (formats.compute, formats.grad, formats.autocast)
    compute, grad, autocast = (_DTYPES[name] if name else None for name in names)
    for dtype in (compute, autocast):
        if dtype is not None and not device.supports(dtype):
            raise ConfigError(
                f"{'fp16' if dtype is torch.float16 else 'bf16'}.enabled: this {device.kind} "
                f"device cannot compute in {str(dtype).removeprefix('torch.')}; use "
                f'"auto", or leave it off'
            )
    if compute is not None and grad is None and config.gradient_accumulation_steps > 1:
        # Sums of many 16-bit gradients lose their last bits; DeepSpeed's bf16 accumulates so too.
        grad = torch.float32
    scale = formats.loss_scale
    precision = Precision(
        compute=compute,
        master=_DTYPES[formats.master] if formats.master else None,
        grad=grad,
        autocast=autocast,
        loss_scale=None if scale is None else LossScale(**vars(scale)),
        inputs=compute if formats.casts_inputs else None,
    )
    return precision, formats.reason


def _place(model: nn.Module, device: torch.device) -> None:
    """Move the model to the device; parameters that are sharded already stay where they are."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.device != device for tensor in tensors):
        model.to(device)


def _broadcast_buffers(model: nn.Module, group: comm.Group) -> None:
    """Start from rank 0's buffers, as the sharding does from its parameters."""
    for name, buffer in model.named_buffers():
        value = buffer.contiguous()
        comm.broadcast(value, group, caller=name)
        if value is not buffer:
            buffer.copy_(value)


def _cast_statistics(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Running statistics of batch norms, which torch wants in the dtype of their weights.

    Other buffers (positions, masks, frequencies) stay as the model made them.
    """
    for module in model.modules():
        if dtype is not None and isinstance(module, nn.modules.batchnorm._NormBase):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.to(dtype))


def _optimizer(
    model: nn.Module,
    config: configuration.Config,
    given: torch.optim.Optimizer | None,
    precision: Precision,
    param_groups: Iterable[dict[str, Any]] | None,
) -> torch.optim.Optimizer:
    if given is not None and param_groups is not None:
        raise DsError(
            "initialize: param_groups are for the optimizer that the config names, but "
            "optimizer= is given, which has its own; leave one of them out"
        )
    if given is not None and config.optimizer is not None:
        logger.info("optimizer: the given one is used, the config's section is not")
    if given is not None:
        if precision.compute is torch.bfloat16:
            low_precision.check_given(config.bf16, given)
        return given
    if config.optimizer is None:
        raise DsError(
            'initialize: there is no optimizer; add an "optimizer" section to the config, such as '
            '{"type": "AdamW", "params": {"lr": 1e-3}}, or pass optimizer='
        )
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    sections = [config.section(name) for name in plugins.registered("sharding")]
    return optimizers.build(
        config.optimizer,
        trainable if param_groups is None else param_groups,
        fuse=not config.sparse_gradients,
        on_host=any(getattr(section, "steps_on_host", False) for section in sections),
    )


def _freeze(model: nn.Module) -> tuple[nn.Parameter, ...]:
    """Leave nothing of the model to be trained; returns what was, to undo it."""
    trained = tuple(param for param in model.parameters() if param.requires_grad)
    for param in trained:
        param.requires_grad_(False)
    return trained


def _provided(seam: plugins.Seam, config: configuration.Config, **parts: Any) -> Any:
    """What an installed package builds for a seam, or None if no section of the config asks.

    An entry is named by the config section that it serves, and is a callable that takes that
    section and `parts` by keyword, and returns None for a section that asks for nothing.
    """
    found: dict[str, Any] = {}
    for name in sorted(plugins.registered(seam)):
        section = config.section(name)
        made = None
        if section is not None:
            made = plugins.load(seam, name)(section=section, **parts)
        if made is not None:
            found[name] = made
    if len(found) > 1:
        raise ConfigError(
            f"{' and '.join(found)}: each asks for its own {seam}, and there can be one; keep one "
            f"of these sections"
        )
    return next(iter(found.values()), None)


def _scheduler(
    config: configuration.Config,
    given: Any,
    sharding: Sharding,
    optimizer: torch.optim.Optimizer,
) -> Any:
    if given is not None and config.scheduler is not None:
        logger.info("scheduler: the given one is used, the config's section is not")
    # Schedules change the groups' hyperparameters, which the sharding shares with `optimizer`.
    if given is None:
        return lr_schedules.build(config.scheduler, optimizer) if config.scheduler else None
    if callable(given) and not hasattr(given, "step"):
        return given(optimizer)
    return given


def _observers(config: configuration.Config) -> list[Observer]:
    found = standard_observers(config, rank=dist.get_rank())
    for name in sorted(plugins.registered("observers")):
        made = plugins.load("observers", name)(config)
        if made is not None:
            found.append(made)
    return found


def _plugin_modules() -> list[str]:
    """Modules of the installed packages that take part in a run."""
    entries = [*plugins.registered("sharding").values(), *plugins.registered("observers").values()]
    return [entry.module for entry in entries]
