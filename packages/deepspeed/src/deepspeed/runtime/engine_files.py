"""What an engine saves and loads, with DeepSpeed's signatures and return values."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepspeed.runtime.base_optimizer import offload_states
from deepspeed.runtime.client_state import packed, unpacked
from deepspeed.runtime.engine_settings import EngineSettings
from deepspeed.runtime.recovery_scripts import write_recovery_scripts
from deepspeed.runtime.weight_placing import check_names, placing
from ds_core import comm
from ds_core.buffers import persistent_buffers
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from ds_core.engine import Engine

logger = logging.getLogger("DeepSpeed")

#: The engine's own counters beside the program's client state.
_COUNTERS = "__deepspeed_counters__"
_POINTERS = ("latest", "latest_universal")


class EngineFiles(EngineSettings):
    """The half of a `DeepSpeedEngine` that concerns files."""

    _engine: Engine
    global_samples: int
    micro_steps: int

    if TYPE_CHECKING:

        @property
        def trains(self) -> bool: ...

        def train_batch_size(self) -> int: ...

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: Any = None,
        client_state: Mapping[Any, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save everything needed to go on, in `save_dir/tag`; returns True. Collective.

        The folder is ds_core's: it loads at any stage and number of ranks, and a crash at any
        moment leaves the checkpoint before it as the latest. Under ZeRO, `save_dir` also gets
        `zero_to_fp32.py`, a script that writes whole weights.

        Args:
            save_dir: shared by all ranks; created.
            tag: name of this checkpoint; default: "global_step" and the step's number.
            client_state: the program's own values; rank 0's are saved.
            save_latest: whether `latest` names this checkpoint from now on.
            exclude_frozen_parameters: leave out what is not trained.
        """
        if not os.fspath(save_dir):
            raise ValueError(f"save_dir: got {save_dir!r}, expected the path of a folder")
        counters = {"global_samples": self.global_samples, "micro_steps": self.micro_steps}
        self._engine.save_checkpoint(
            save_dir,
            f"global_step{self._engine.global_step}" if tag is None else str(tag),
            {**packed(client_state or {}), _COUNTERS: counters},
            save_latest=save_latest,
            exclude_frozen_parameters=exclude_frozen_parameters,
        )
        if self.zero_optimization():
            group, what = self._engine.mesh.group("dp"), f"save_checkpoint to {save_dir}"
            _rank0(group, lambda: write_recovery_scripts(save_dir), what)
        return True

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint of this package or of DeepSpeed's; returns its path and client state.

        Any stage and number of ranks may have saved it. (None, None), with a warning, if there is
        no tag and nothing in `load_dir` names the latest. Collective.

        Args:
            load_dir: holds the checkpoints, or is one.
            tag: which one; default: the latest.
            load_module_strict: whether names that only the model or only the checkpoint has are an
                error.
            load_optimizer_states: if False, the optimizer keeps its own state.
            load_lr_scheduler_states: if False, the schedule keeps its place.
            load_module_only: load the weights and nothing else.
            custom_load_fn: called on every rank with `src`, the weights of the checkpoint by name,
                and `dst`, the model, whole and in its own dtypes; puts the one into the other.
        """
        name = None if tag is None else str(tag)
        group = self._engine.mesh.group("dp")
        found = _rank0(group, lambda: _checkpoint_path(load_dir, name), "load_checkpoint")
        if found is None:
            logger.warning(
                "Unable to find latest file at %s: nothing is loaded; pass the tag of a checkpoint "
                "there, or the folder of another run",
                os.path.join(load_dir, "latest"),
            )
            return None, None
        client = self._engine.load_checkpoint(
            load_dir,
            name,
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states and self.trains,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            place_weights=None if custom_load_fn is None else placing(self._engine, custom_load_fn),
        )
        counters = client.pop(_COUNTERS, {})
        if not load_module_only:
            seen = self._engine.global_step * self.train_batch_size()
            self.global_samples = int(counters.get("global_samples", seen))
            self.micro_steps = int(
                counters.get("micro_steps", self._engine.global_step * self._engine.accumulation)
            )
        return found, unpacked(client)

    # ------------------------------------------------------------------ weights

    def module_state_dict(
        self,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """The model's parameters and buffers; at stage 3 whole on every rank, and collective."""
        module = self._engine.module
        if self.zero_optimization_partition_weights():
            whole = self._engine.state_dict()
            state: dict[str, Any] = {} if destination is None else destination
            state.update({f"{prefix}{name}": value for name, value in whole.items()})
        else:
            given = {} if destination is None else {"destination": destination}
            state = module.state_dict(**given, prefix=prefix, keep_vars=keep_vars)
        if exclude_frozen_parameters:
            for name, param in module.named_parameters(remove_duplicate=False):
                if not param.requires_grad:
                    state.pop(f"{prefix}{name}", None)
        return state

    def load_module_state_dict(
        self,
        checkpoint: Mapping[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[..., Any] | None = None,
        fetch_z3_params: bool = False,
        z3_params_to_fetch: Iterable[Any] | None = None,
        allowed_missing_keys: Iterable[str] | None = None,
    ) -> None:
        """Take over the weights in `checkpoint["module"]`, at every stage. Collective.

        Args:
            checkpoint: a mapping with the weights by name.
            strict: whether names that only the model or only the weights have are an error.
            custom_load_fn: see `load_checkpoint`.
            fetch_z3_params, z3_params_to_fetch: make no difference: each rank takes its part.
            allowed_missing_keys: names that the weights may lack though `strict`.
        """
        values: Mapping[str, Any] = checkpoint["module"]
        if custom_load_fn is not None:
            placing(self._engine, custom_load_fn)(values)
            return
        if strict and allowed_missing_keys is not None:
            check_names(self._engine.module, values, set(allowed_missing_keys))
            strict = False
        self._engine.load_state_dict(values, strict=strict)

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, torch.Tensor] | None:
        """The whole model in its own dtypes, in host memory of rank 0; None elsewhere. Collective.

        Parameter by parameter. Raises ValueError below stage 3.
        """
        if not self.zero_optimization_partition_weights():
            raise ValueError("the weights are not partitioned below ZeRO stage 3; use state_dict()")
        module, first = self._engine.module, self._engine.mesh.group("dp").rank == 0
        state: OrderedDict[str, torch.Tensor] = OrderedDict()
        names: dict[int, str] = {}
        for name, param in module.named_parameters(remove_duplicate=False):
            if exclude_frozen_parameters and not param.requires_grad:
                continue
            known = names.setdefault(id(param), name)
            if known != name:
                state[name] = state[known]
                continue
            value = self._engine.sharding.full_parameter(name)
            state[name] = value.detach().to("cpu", param.dtype, copy=True) if first else value[:0]
        for name, buffer in persistent_buffers(module):
            state.setdefault(name, buffer.detach().cpu())
        return state if first else None

    def _consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, torch.Tensor] | None:
        """See `_zero3_consolidated_16bit_state_dict`."""
        return self._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the whole model in its own dtypes as one file of torch's; whether it was written.

        At stage 3 only with stage3_gather_16bit_weights_on_model_save. Collective.
        """
        path = Path(save_dir) / save_filename
        if self.zero_optimization_partition_weights():
            if not self.zero_gather_16bit_weights_on_model_save():
                logger.info(
                    "Did not save the model %s because "
                    "stage3_gather_16bit_weights_on_model_save is False",
                    path,
                )
                return False
            state = self._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)
        else:
            state = self.module_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)
        group = self._engine.mesh.group("dp")
        _rank0(group, lambda: _write(path, state), f"save_16bit_model to {path}")
        return True

    def save_fp16_model(
        self, save_dir: str | os.PathLike[str], save_filename: str = "pytorch_model.bin"
    ) -> bool:
        """Former name of `save_16bit_model`."""
        return self.save_16bit_model(save_dir, save_filename)

    # ------------------------------------------------------------------ parking

    def offload_states(
        self,
        include: Iterable[Any] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Park state that rests in host memory, until `reload_states`. Collective.

        Args:
            include: kinds of state, as names or as OffloadStateTypeEnum; default: all.
            device: "cpu", or "none" for nothing; a name or OffloadDeviceEnum.
            pin_memory: whether host memory is page-locked.
            non_blocking: return while copies are under way.
        """
        offload_states(self._engine, include, device, pin_memory, non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` parked, bit for bit. Collective."""
        self._engine.reload_states(non_blocking)


def _checkpoint_path(load_dir: str | os.PathLike[str], tag: str | None) -> str | None:
    """The folder of a checkpoint, or None if no tag is given and none is the latest."""
    from ds_core.checkpoint.foreign_load import deepspeed_folder
    from ds_core.checkpoint.index import INDEX_NAME
    from ds_core.checkpoint.remote import as_place

    base = as_place(load_dir)
    if tag is not None:
        return str(base / tag)
    for pointer in _POINTERS:
        if (base / pointer).is_file():
            return str(base / (base / pointer).read_text(encoding="utf-8").strip())
    is_one = (base / INDEX_NAME).is_file() or deepspeed_folder(load_dir) is not None
    return str(base) if is_one else None


def _rank0(group: comm.Group, step: Any, what: str) -> Any:
    """What `step` returns on rank 0, on all ranks. Raises CheckpointError on all if it fails."""
    outcome: tuple[str | None, Any] = (None, None)
    if group.rank == 0:
        try:
            outcome = (None, step())
        except Exception as error:
            outcome = (f"{type(error).__name__}: {error}", None)
    failure, result = comm.broadcast_object(outcome, group, caller=what)
    if failure is not None:
        raise CheckpointError(f"{what}: {failure}")
    return result


def _write(path: Path, state: Any) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    torch.save(state, draft)
    os.replace(draft, path)
