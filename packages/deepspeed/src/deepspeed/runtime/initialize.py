"""`initialize`: a model and a configuration become an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from deepspeed.runtime.config_reading import read_config
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.parallel_unit import check_unit, mesh_of
from deepspeed.runtime.zero.partition_parameters import (
    restore_init_context,
    shutdown_init_context,
)
from ds_core import comm
from ds_core.errors import ConfigError

logger = logging.getLogger("DeepSpeed")


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """The engine of a model, its optimizer, its data loader and its schedule, in this order.

    Args:
        args: parsed arguments; `deepspeed_config` is used if `config` is not given.
        model: the model to train, unwrapped.
        optimizer: on its parameters, or a callable that makes one of a list of them; default: the
            one that the configuration names. With neither, the engine only runs the model.
        model_parameters: what to train: parameters, or groups as torch.optim takes them; default:
            all that require a gradient.
        training_data: a map-style dataset.
        lr_scheduler: one on the optimizer, or a callable that makes it of one; default: the one
            that the configuration names.
        distributed_port: not used; MASTER_PORT of the launcher counts.
        mpu: of data parallelism alone.
        dist_init_required: not used; a process group is started if none runs.
        collate_fn: for the data loader.
        config: a dict, the path of a JSON file, or JSON as URL-safe base64.
        mesh_param: (data-parallel ranks, 1).
        config_params: another name of `config`.

    What is not asked for is None. Raises ConfigError for a configuration that cannot be honoured,
    NotProvidedError for parallelism that is not there, DsError for a model or optimizer that cannot
    be trained. Collective.
    """
    source = _config_source(args, config if config is not None else config_params)
    comm.init()
    check_unit(mpu)
    given = read_config(source)
    # Inside `zero.Init` the engine and what it makes are built as outside it.
    shutdown_init_context()
    try:
        engine = DeepSpeedEngine(
            args=args,
            model=model,
            optimizer=optimizer,
            model_parameters=_once(model_parameters),
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            mpu=mpu,
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            config=given,
            mesh_device=mesh_of(mesh_param, given),
        )
    finally:
        restore_init_context()
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _once(model_parameters: Any) -> Any:
    """An iterator as a list, which can be read more than once."""
    return list(model_parameters) if hasattr(model_parameters, "__next__") else model_parameters


def _config_source(args: Any, config: Any) -> Any:
    """The one configuration that is given. Raises ConfigError if none is, or two."""
    old, new = (getattr(args, key, None) for key in ("deepscale_config", "deepspeed_config"))
    if old is not None:
        logger.warning("--deepscale_config is the former name of --deepspeed_config")
    given = [each for each in (old, new, config) if each is not None]
    if not given:
        raise ConfigError(
            "deepspeed.initialize: no configuration is given; pass config=, a dict or the path of "
            "a JSON file, or --deepspeed_config on the command line"
        )
    if len(given) > 1:
        raise ConfigError(
            "deepspeed.initialize: got a configuration in args.deepspeed_config and another in "
            "config=; keep one"
        )
    return given[0]
