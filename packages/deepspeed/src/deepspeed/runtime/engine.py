"""`DeepSpeedEngine`: ds_core's engine with the members that programs of DeepSpeed use."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

import ds_core
from deepspeed._errors import NotProvidedError
from deepspeed._names import names_of
from deepspeed._parameter_attributes import mark_model
from deepspeed.runtime import _constants, _env
from deepspeed.runtime.base_optimizer import EngineOptimizer, optimizer_class
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.dataloader import DeepSpeedDataLoader
from deepspeed.runtime.engine_files import EngineFiles
from deepspeed.runtime.lr_schedules import schedule_maker
from deepspeed.runtime.parallel_unit import name_groups
from deepspeed.runtime.schedule_steps import SteppedSchedule, steps_alone
from deepspeed.runtime.trained import optimizer_of, settle_trained
from deepspeed.runtime.zero.placeholders import give_placeholders
from deepspeed.utils import groups
from ds_core import accelerator, comm
from ds_core.errors import DsError
from ds_zero import ZeroOptimizer

logger = logging.getLogger("DeepSpeed")

__getattr__, __dir__ = names_of(
    __name__,
    {
        name: f"{_constants.__name__}:{name}"
        for name in (
            *("DeepSpeedOptimizerCallable", "DeepSpeedSchedulerCallable"),
            *("MEMORY_OPT_ALLREDUCE_SIZE", *_constants.OPTIMIZER_NAMES),
        )
    },
)

_TIMERS = "set wall_clock_breakdown, and metrics.jsonl for times as numbers"
_BUCKETS = "gradients are averaged while backward runs; use no_sync() to put that off"
_DEEPCOMPILE = "DeepCompile is not provided; engine.compile() is torch.compile of the blocks"
#: What the original's engine has and this one has not: what to use instead.
_INSTEAD: MappingProxyType[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("timers", "engine_timers", "tput_timer", "get_wall_clock_timers"), _TIMERS
        ),
        **dict.fromkeys(
            (
                *("allreduce_gradients", "allreduce_bucket", "buffered_allreduce_fallback"),
                *("allreduce_and_copy", "allreduce_no_retain", "all_gather_scalar"),
                *("sparse_allreduce", "sparse_allreduce_bucket", "sparse_allreduce_no_retain"),
                "sparse_all_gather",
            ),
            _BUCKETS,
        ),
        **dict.fromkeys(
            (
                *("get_deepcompile_backend", "get_deepspeed_compile_backend", "get_compile_time"),
                *("get_autosp_backend", "get_autotp_backend", "register_compile_pass"),
            ),
            _DEEPCOMPILE,
        ),
        "get_optimizer_configuration": "see engine.optimizer.param_groups",
        "print_forward_breakdown": _TIMERS,
        "dynamic_loss_scale_args": "see engine.optimizer.loss_scale",
        "swap_tensor_config": "see engine.zero_offload_optimizer()",
        "tensor_parallel_config": "ds-pipe will bring tensor parallelism",
        "autotuning_profile_model_info": "run `ds tune CONFIG`",
        "random_ltd_initialize": "initialize sets up what data_efficiency asks for",
        "clip_fp32_gradients": "step() clips; set gradient_clipping",
        "load_moe_state_dict": "ds-moe will bring experts on ranks of their own",
        "set_custom_curriculum_learning_schedule": "give the schedule in "
        "data_efficiency.data_sampling.curriculum_learning",
        "generate_batch": "call generate of the module",
    }
)


class _NotProvidedMemberError(NotProvidedError, AttributeError):
    """A member that this engine has not; `hasattr` says so too."""


class DeepSpeedEngine(EngineFiles):
    """A model in training, as `deepspeed.initialize` returns it.

    Attributes:
        module: the model itself; whatever the engine has not is looked for there.
        optimizer: see `EngineOptimizer`; None for an engine that only runs the model, below
            stage 1.
        lr_scheduler: stepped after each optimizer step that was not skipped, or None.
        training_dataloader: yields this rank's micro-batches of the training data, or None.
        config: the configuration as the program wrote it.
        global_samples: samples over all ranks that steps were taken with.
        micro_steps: calls of `step`.

    Without an optimizer, passed or in the configuration, the engine runs the model only: its
    parameters are frozen until `destroy`.
    """

    def __init__(
        self,
        args: Any = None,
        model: nn.Module | None = None,
        optimizer: Any = None,
        model_parameters: Any = None,
        training_data: Dataset[Any] | None = None,
        lr_scheduler: Any = None,
        mpu: Any = None,
        dist_init_required: bool | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        config: Any = None,
        config_class: DeepSpeedConfig | None = None,
        mesh_device: Any = None,
        dont_change_device: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise DsError(
                f"deepspeed.initialize: model: got {type(model).__name__}, expected a "
                f"torch.nn.Module"
            )
        comm.init()
        if dont_change_device:
            _require_on_device(model)
        self._config = config_class or DeepSpeedConfig(config, mpu, mesh_device)
        self.config = self._config._param_dict
        self.mpu, self.collate_fn, self.training_data = mpu, collate_fn, training_data
        self.client_optimizer, self.client_lr_scheduler = optimizer, lr_scheduler
        self.global_samples = self.micro_steps = 0
        name_groups(mpu, mesh_device)
        ours, trains = self._config.ours, optimizer is not None or bool(self._config.optimizer_name)
        given, param_groups = None, None
        if trains:
            given, param_groups = optimizer_of(model, optimizer, model_parameters)
            settle_trained(model, given, param_groups, model_parameters)
        own_loader = training_data is not None and self.data_efficiency_enabled()
        engine = ds_core.initialize(
            model,
            ours,
            optimizer=given,
            lr_scheduler=self._schedule(lr_scheduler) if trains else None,
            training_data=training_data if own_loader else None,
            collate_fn=collate_fn,
            param_groups=param_groups,
            training=trains,
        )
        engine.skips_nonfinite = _skips_nonfinite(self.config)
        self.module = model
        # Not as a module: it holds the same model.
        object.__setattr__(self, "_engine", engine)
        object.__setattr__(self, "_is_open", True)
        self.lr_scheduler = engine.lr_scheduler
        if self.lr_scheduler is not None and not steps_alone(self.lr_scheduler):
            engine.lr_scheduler = SteppedSchedule(self.lr_scheduler, self.train_batch_size)
        self.optimizer: EngineOptimizer | None = None
        self.basic_optimizer = _inner_of(engine.sharding) if trains else None
        if trains or self.zero_optimization():
            stage = self.zero_optimization_stage()
            kind = optimizer_class(stage, engine.precision.compute)
            self.optimizer = kind(engine, self.basic_optimizer, stage=stage)
        mark_model(model, engine.sharding)
        if self.zero_optimization_partition_weights():
            give_placeholders(model)
        self.training_dataloader: Any = engine.dataloader
        if training_data is not None and not own_loader:
            self.training_dataloader = self.deepspeed_io(training_data)
        self.monitor = EngineMonitor(engine, self.config)

    def _schedule(self, given: Any) -> Any:
        """The schedule to use: the one passed, or that of the configuration under its own class."""
        name = self._config.scheduler_name
        if given is not None or name is None:
            return given
        return schedule_maker(name, self._config.scheduler_params or {})

    def __getattr__(self, name: str) -> Any:
        """Whatever the engine has not, the model may have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
        if module is not None and hasattr(module, name):
            return getattr(module, name)
        if name in _INSTEAD:
            raise _NotProvidedMemberError(f"engine.{name} is not provided; {_INSTEAD[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ------------------------------------------------------------------ a step

    @property
    def trains(self) -> bool:
        """Whether there is an optimizer."""
        return self.basic_optimizer is not None

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model; its outputs remember the loss scale, for a plain `loss.backward()`."""
        return self._engine(*inputs, **kwargs)

    def train(self, mode: bool = True) -> DeepSpeedEngine:
        """Put the model into training mode."""
        super().train(mode)
        self._engine.training = mode
        return self

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> torch.Tensor:
        """Backward of one micro-batch's loss; returns it as it was divided.

        Args:
            loss: a scalar.
            retain_graph: keep what autograd has saved, for another backward through it.
            scale_wrt_gas: whether to divide by `gradient_accumulation_steps()`; if not, the caller
                has done so, or weighs the micro-batches otherwise.
        """
        self._require_optimizer("backward")
        self._engine.backward(
            loss, retain_graph=retain_graph, divides_by_accumulation=scale_wrt_gas
        )
        steps = self._engine.accumulation
        return loss / steps if scale_wrt_gas and steps > 1 else loss

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss for a plain `.backward()`: itself, as the model's outputs know the scale."""
        self._require_optimizer("scale")
        return loss

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """Count one micro-batch; after the last of a step, clip and update the parameters.

        A step whose gradients are not finite is skipped on all ranks. lr_kwargs: arguments of the
        schedule's `step`.
        """
        self._require_optimizer("step")
        before, engine = self._engine.global_step, self._engine
        schedule = engine.lr_scheduler
        if lr_kwargs:
            engine.lr_scheduler = SteppedSchedule(self.lr_scheduler, None, lr_kwargs)
        try:
            engine.step()
        finally:
            engine.lr_scheduler = schedule
        self.micro_steps += 1
        if engine.global_step > before:
            self.global_samples += self.train_batch_size()
            if not engine.was_step_applied and not engine.scaler.may_skip:
                logger.warning(
                    "step %d is skipped: the gradient norm is %s",
                    engine.global_step - 1, engine.grad_norm,
                )  # fmt: skip

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what accumulates; at stages 2 and 3 nothing, as there only a step forgets it."""
        if not self.zero_optimization_partition_gradients():
            self._engine.zero_grad()

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside accumulate locally; the next one outside averages over ranks."""
        return self._engine.no_sync()

    def coalesce_grad_reduction(self) -> AbstractContextManager[None]:
        """Several backwards inside are averaged over ranks once, together, at the end."""
        return self._engine.reduce_once()

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Say whether the present micro-batch ends its step, until told otherwise; None: count."""
        self._engine.set_boundary(is_boundary)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the present micro-batch is the last of its step."""
        return self._engine.is_boundary

    def was_step_applied(self) -> bool:
        """Whether the last `step` updated the parameters."""
        return self._engine.was_step_applied

    def get_global_grad_norm(self) -> float | None:
        """Global L2 norm of the last step's gradients before clipping; None before a step."""
        return self._engine.grad_norm

    def _require_optimizer(self, what: str) -> None:
        if not self.trains:
            raise DsError(
                f"{what}: this engine has no optimizer and only runs the model; pass optimizer= to "
                f"deepspeed.initialize, or add an optimizer section to the configuration"
            )

    # ------------------------------------------------------------------ counters and sizes

    @property
    def global_steps(self) -> int:
        """Optimizer steps taken, skipped ones included."""
        return self._engine.global_step

    @global_steps.setter
    def global_steps(self, value: int) -> None:
        self._engine.global_step = value

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because gradients were not finite."""
        return self._engine.skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self._engine.skipped_steps = value

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self._engine.accumulation

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per micro-batch of one rank."""
        return self._engine.micro_batch_size

    def train_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        engine = self._engine
        return engine.micro_batch_size * engine.accumulation * engine.mesh.size("dp")

    def get_batch_info(self) -> tuple[int, int, int]:
        """Train batch size, micro-batch size and micro-batches per step."""
        return (
            self.train_batch_size(),
            self.train_micro_batch_size_per_gpu(),
            self.gradient_accumulation_steps(),
        )

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Make a step as many micro-batches as give so many samples over all ranks."""
        self._engine.set_train_batch_size(train_batch_size)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """State how many samples a micro-batch of one rank has from now on."""
        self._engine.set_train_micro_batch_size(micro_batch_size)

    # ------------------------------------------------------------------ precision and schedule

    def fp16_enabled(self) -> bool:
        """Whether the model computes in fp16."""
        return self._engine.precision.compute is torch.float16

    def bfloat16_enabled(self) -> bool:
        """Whether the model computes in bf16."""
        return self._engine.precision.compute is torch.bfloat16

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale is adjusted while training."""
        policy = self._engine.precision.loss_scale
        return policy is not None and policy.static is None

    def initial_dynamic_scale(self) -> float:
        """The first adjusted loss scale."""
        return 2.0**self._config.float16_config.initial_scale_power

    def torch_autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast around forward, or None."""
        return self._engine.precision.autocast

    @property
    def communication_data_type(self) -> torch.dtype:
        """The dtype in which gradients travel."""
        named = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        precision, asked = self._engine.precision, self._config.communication_data_type
        if asked is not None:
            return named[asked]
        return precision.grad or precision.compute or next(self.module.parameters()).dtype

    def get_lr(self) -> list[Any]:
        """The learning rate of each group."""
        return self._of_groups("lr")

    def get_type(self) -> list[Any]:
        """The entry "type" of each group."""
        return self._of_groups("type")

    def get_mom(self) -> list[Any]:
        """The momentum, or the betas, of each group."""
        return self._of_groups(
            "momentum" if self.optimizer_name() in ("SGD", "RMSprop") else "betas"
        )

    def _of_groups(self, key: str) -> list[Any]:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [group.get(key, 0.0) for group in groups]

    # ------------------------------------------------------------------ ranks

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._engine.device

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self._engine.mesh.size("dp")

    dp_world_size = seq_dp_world_size = world_size

    @property
    def global_rank(self) -> int:
        """This process's rank among all."""
        return self._engine.mesh.group("dp").rank

    @property
    def local_rank(self) -> int:
        """This process's rank on its machine."""
        return _env.local_rank()

    @property
    def mp_world_size(self) -> int:
        """Ranks that a model is split over: one."""
        return 1

    sequence_parallel_size = mp_world_size

    @property
    def data_parallel_group(self) -> Any:
        """torch's process group of the ranks that have batches of their own."""
        return self._engine.mesh.group("dp").pg

    def get_sequence_parallel_group(self) -> Any:
        """The ranks that share each sequence. Raises NotProvidedError: no such group was made."""
        return groups._get_sequence_parallel_group()

    def get_data_parallel_rank(self) -> int:
        """This process's rank among those that have batches of their own."""
        return self.global_rank

    def get_model_parallel_rank(self) -> int:
        """This process's rank among those that a model is split over."""
        return 0

    get_tensor_parallel_rank = get_model_parallel_rank

    # ------------------------------------------------------------------ beside the loop

    def deepspeed_io(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DeepSpeedDataLoader:
        """This rank's loader of a map-style dataset; in order unless `route` is "train"."""
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise ValueError(
                f"dataset: got {type(dataset).__name__}, expected a map-style dataset with "
                f"__getitem__ and __len__"
            )
        if data_sampler is None and route != "train":
            data_sampler = torch.utils.data.DistributedSampler(
                dataset, num_replicas=self.world_size, rank=self.global_rank, shuffle=False
            )
        return DeepSpeedDataLoader(
            dataset,
            batch_size or self.train_micro_batch_size_per_gpu(),
            pin_memory=pin_memory and torch.accelerator.is_available(),
            collate_fn=collate_fn or self.collate_fn,
            num_local_io_workers=num_local_io_workers,
            data_sampler=data_sampler,
            data_parallel_world_size=self.world_size,
            data_parallel_rank=self.global_rank,
            dataloader_drop_last=self.dataloader_drop_last(),
        )

    def set_data_post_process_func(self, post_process_func: Callable[..., Any]) -> None:
        """Have each batch of the training data go through a function."""
        if self._engine.dataloader is not None:
            self._engine.dataloader.post_process = post_process_func
        elif self.training_dataloader is not None:
            self.training_dataloader.post_process_func = post_process_func

    def compile(
        self,
        backend: str | Callable[..., Any] = "inductor",
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """torch.compile the model's repeated blocks, or all of it if it has none; once.

        Args:
            backend: of torch.compile.
            compile_kwargs: its further arguments.
            schedule: of DeepCompile; not provided.
            compiled_autograd_enabled: not provided.
        """
        if schedule is not None or compiled_autograd_enabled:
            raise NotProvidedError(
                "engine.compile: schedule and compiled_autograd_enabled belong to DeepCompile, "
                "which is not provided; leave them out"
            )
        if not self._engine.is_compiled:
            self._engine.compile(backend=backend, **(compile_kwargs or {}))

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._engine.is_compiled

    def is_deepcompile_enabled(self) -> bool:
        """Whether DeepCompile is on: never."""
        return False

    is_deepcompile_active = is_deepcompile_enabled

    def collect_python_gc(self) -> int:
        """Run Python's garbage collector now; returns how many objects it found."""
        return gc.collect()

    def empty_partition_cache(self) -> None:
        """Nothing: no more is kept of the parameters than is in use."""

    def destroy(self) -> None:
        """End training: the module has no hooks, and states and gradients are freed. Once.

        At stage 3 its parameters stay sharded: `deepspeed.zero.GatheredParameters` makes them
        whole, and `initialize` takes them over. Waits for a checkpoint that is being written.
        """
        if self._is_open:
            object.__setattr__(self, "_is_open", False)
            self._engine.close(whole=False)


class EngineMonitor:
    """Figures of the program's own, to every sink of metrics that the configuration names.

    Attributes:
        enabled: whether there is one.
    """

    def __init__(self, engine: ds_core.Engine, config: Mapping[str, Any]) -> None:
        self._engine = engine
        names = ("tensorboard", "wandb", "csv_monitor", "comet")
        sections = [config.get(name) for name in names]
        self.enabled = any(isinstance(s, Mapping) and s.get("enabled") is True for s in sections)

    def write_events(self, event_list: Iterable[tuple[str, Any, Any]]) -> None:
        """Hand over (name, value, samples so far) triples; rank 0's are written."""
        self._engine.log({name: value for name, value, *_ in event_list})


def _require_on_device(model: nn.Module) -> None:
    """Raise NotProvidedError if part of a model that must stay where it is, is elsewhere."""
    device = accelerator.current().device()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != device:
            raise NotProvidedError(
                f"dont_change_device: got True, and {name} is on {tensor.device}: an engine "
                f"computes on {device}; move the model there, or leave it out"
            )


def _skips_nonfinite(config: Mapping[str, Any]) -> bool:
    """Whether steps without finite gradients are skipped: not if the program says never to look."""
    section = config.get("bf16", config.get("bfloat16", {}))
    return not (isinstance(section, Mapping) and section.get("check_grad_overflow") is False)


def _inner_of(sharding: Any) -> torch.optim.Optimizer:
    """The optimizer that does the arithmetic of a sharding."""
    if isinstance(sharding, ZeroOptimizer):
        return sharding.inner
    if isinstance(sharding, torch.optim.Optimizer):
        return sharding
    inner: torch.optim.Optimizer = sharding.optimizer
    return inner
