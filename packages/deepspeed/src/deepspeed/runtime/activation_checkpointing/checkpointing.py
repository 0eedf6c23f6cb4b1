"""`deepspeed.checkpointing`: computing activations again, on ds_core.activation_checkpointing.

`configure` sets what `checkpoint` does with the inputs that it keeps. Arguments that it does not
name are as if nobody had configured anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspeed._names import names_of
from deepspeed.comm._groups import group_of
from deepspeed.utils.logging import logger
from ds_core.activation_checkpointing import Policy, RngStates
from ds_core.activation_checkpointing.rng_states import TENSOR_PARALLEL
from ds_core.activation_checkpointing.section import ActivationCheckpointingSection
from ds_core.config.document import read
from ds_core.errors import ConfigError


@dataclass
class _State:
    """What the program has configured."""

    policy: Policy = field(default_factory=Policy)
    mpu: Any = None
    is_configured: bool = False
    partitions: bool = False
    offloads: bool = False
    reuses: bool = False
    synchronizes: bool = False

    def update(self) -> None:
        """Make the policy of the settings."""
        group = _model_parallel_group(self.mpu) if self.partitions else None
        self.policy = Policy(
            offload_to_cpu=self.offloads,
            partition_group=group,
            reuses_buffers=self.reuses and group is not None,
            synchronize=self.synchronizes,
        )


_state = _State()


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, whose intermediate tensors are computed again in backward.

    Values and gradients are those of a plain call, random numbers included.
    """
    return _state.policy(function, *args, **kwargs)


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """The same as `checkpoint`, which never re-enters autograd."""
    return checkpoint(function, *args)


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Set what `checkpoint` does from now on. Collective if activations are partitioned.

    Args:
        mpu_: an object with Megatron's functions, or None; its model-parallel group is over which:
        partition_activations: each rank keeps its part of the inputs.
        contiguous_checkpointing: the parts lie in buffers that are used again.
        checkpoint_in_cpu: inputs wait in pinned host memory.
        synchronize: the device is waited for around each call.
        deepspeed_config: a file or dict whose section "activation_checkpointing" says all that,
            where the arguments do not.
        num_checkpoints: makes no difference: buffers grow as needed.
        profile: makes no difference, and a warning says so: the FLOPS profiler tells it.

    Raises ConfigError for settings that contradict each other.
    """
    given = {
        "partition_activations": partition_activations,
        "contiguous_memory_optimization": contiguous_checkpointing,
        "cpu_checkpointing": checkpoint_in_cpu,
        "synchronize_checkpoint_boundary": synchronize,
        "profile": profile,
    }
    settings = _section_of(deepspeed_config) if deepspeed_config is not None else {}
    settings |= {key: value for key, value in given.items() if value is not None}
    known = ActivationCheckpointingSection.model_fields
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(f"activation_checkpointing: unknown key {unknown[0]!r}")
    if settings.get("profile"):
        logger.warning(
            "activation_checkpointing.profile makes no difference; "
            '"flops_profiler" shows forward, recomputation and backward of every module'
        )
    if settings.get("contiguous_memory_optimization") and not settings.get("partition_activations"):
        raise ConfigError(
            "activation_checkpointing.contiguous_memory_optimization: got true without "
            "partition_activations, whose parts are what the buffers hold; add it, or leave it out"
        )
    _state.mpu = mpu_ if mpu_ is not None else _state.mpu
    _state.partitions = bool(settings.get("partition_activations"))
    _state.offloads = bool(settings.get("cpu_checkpointing"))
    _state.reuses = bool(settings.get("contiguous_memory_optimization"))
    _state.synchronizes = bool(settings.get("synchronize_checkpoint_boundary"))
    _state.update()
    _state.is_configured = True


def is_configured() -> bool:
    """Whether `configure` has been called."""
    return _state.is_configured


def reset() -> None:
    """Let go of buffers and copies of forwards that had no backward."""
    _state.update()


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Switch partitioning on or off, everything else as it was."""
    _state.partitions = partition_activation
    _state.update()


def set_num_layers(nlayers: int) -> None:
    """Makes no difference: buffers grow as needed."""


class CudaRNGStatesTracker:
    """Named random states, by the original's methods; see `ds_core.activation_checkpointing`."""

    def __init__(self) -> None:
        self._states = RngStates()

    def reset(self) -> None:
        """Forget all states."""
        self._states = RngStates(self._states.device)

    def get_states(self) -> dict[str, torch.Tensor]:
        """Copies of the states by name."""
        return self._states.state_dict()

    def set_states(self, states: Mapping[str, torch.Tensor]) -> None:
        """Go on from `get_states()`, whatever states there were."""
        fresh = RngStates(self._states.device)
        for number, name in enumerate(states):
            fresh.add(name, number)
        fresh.load_state_dict(states)
        self._states = fresh

    def add(self, name: str, seed: int) -> None:
        """Begin a state. Raises DsError if its name or its seed is in use."""
        self._states.add(name, seed)

    def fork(self, name: str = TENSOR_PARALLEL) -> AbstractContextManager[None]:
        """A context that draws from a state, which goes on from there the next time."""
        return self._states.fork(name)


_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """The named random states of this process."""
    return _tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed what all ranks of a model-parallel group draw alike, and a state that each draws apart.

    Needs the mpu of `configure` where there is more than one model-parallel rank.
    """
    _tracker.reset()
    torch.manual_seed(seed)
    _tracker.add(TENSOR_PARALLEL, seed + 2718 + _model_parallel_rank())


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Seed anew what each model-parallel rank draws apart."""
    with _tracker.fork():
        torch.manual_seed(seed + 2718 + _model_parallel_rank())


def _section_of(config: Any) -> dict[str, Any]:
    if isinstance(config, str | os.PathLike):
        config = read(config).data
    whole = config if isinstance(config, Mapping) else config.param_dict
    found = dict(whole.get("activation_checkpointing") or {})
    # They choose blocks for an engine; a program that calls `checkpoint` chose them itself.
    return {key: value for key, value in found.items() if key not in _FOR_ENGINES}


_FOR_ENGINES = ("blocks", "number_checkpoints")


def _model_parallel_rank() -> int:
    from deepspeed.utils import groups

    ask = _asked(_state.mpu or groups.mpu, "rank")
    return int(ask()) if ask is not None else 0


def _model_parallel_group(mpu: Any) -> Any:
    ask = _asked(mpu, "group")
    if ask is None:
        logger.warning(
            "checkpointing.configure: partition_activations makes no difference: nothing says "
            "which ranks hold the same activations; pass an mpu with get_model_parallel_group()"
        )
        return None
    return group_of(ask())


def _asked(mpu: Any, what: str) -> Callable[[], Any] | None:
    """Megatron's newer function, or its older one; None without an mpu."""
    if mpu is None:
        return None
    older: Callable[[], Any] | None = getattr(mpu, f"get_model_parallel_{what}", None)
    newer: Callable[[], Any] | None = getattr(mpu, f"get_tensor_model_parallel_{what}", None)
    return newer or older


_PARTS = "use ds_core.activation_checkpointing.Policy, which moves and splits inputs itself"

__getattr__, __dir__ = names_of(
    __name__,
    {},
    missing=dict.fromkeys(
        (
            *("CheckpointFunction", "detach_variable", "get_partition_start"),
            *("get_partition_size", "gather_partitioned_activations", "extract_tensors"),
            *("merge_tensors", "is_activation_to_checkpoint", "partition_activations"),
            *("get_partitioned_activations_for_backward", "get_cpu_activations_for_backward"),
            *("get_offloaded_activations_for_backward", "restore_offloaded_activations"),
        ),
        _PARTS,
    ),
)
