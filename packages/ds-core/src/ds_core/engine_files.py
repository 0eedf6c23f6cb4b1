"""What an engine saves and loads: its model, and checkpoints of everything."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ds_core import comm
from ds_core.agreement import TagValidation, agree_on_tag
from ds_core.buffers import persistent_buffers
from ds_core.seams import EventKind, Sharding

if TYPE_CHECKING:
    from ds_core.checkpoint import LoadedWeights
    from ds_core.engine import Engine


class EngineFiles(nn.Module):
    """The half of an `Engine` that concerns files; the other half trains."""

    module: nn.Module
    sharding: Sharding
    mesh: comm.Mesh
    global_step: int
    _tag_validation: TagValidation

    if TYPE_CHECKING:

        def _emit(self, kind: EventKind, /, **values: Any) -> None: ...

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's parameters and buffers, whole on every rank, copied to the CPU.

        The names are those of the model's own `state_dict`, so that it loads without an engine.
        """
        state: dict[str, Any] = self.sharding.full_state_dict()
        first_names = {id(p): name for name, p in self.module.named_parameters()}
        for name, param in self.module.named_parameters(remove_duplicate=False):
            state.setdefault(name, state[first_names[id(param)]])  # a tied one under both names
        state.update(self.buffer_state())
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> None:
        """Take over parameters and buffers as `state_dict` returns them; the optimizer stays.

        Raises CheckpointError if names (unless `strict` is false) or shapes differ. Collective.
        """
        from ds_core.engine_state import load_model

        load_model(cast("Engine", self), state_dict, strict=strict)

    def buffer_state(self) -> dict[str, torch.Tensor]:
        """Persistent buffers by name, copied to the CPU."""
        parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        with torch.no_grad():
            return {
                name: tensor.detach().to("cpu", copy=True)
                for name, tensor in persistent_buffers(self.module)
                if name not in parameters
            }

    def save_checkpoint(
        self,
        directory: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        *,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> str:
        """Save everything needed to go on, at any stage and world size; returns the path.

        Args:
            directory: shared by all ranks.
            tag: name of this checkpoint; default: "step" and the step's number. Where ranks pass
                different ones, that of rank 0 counts, unless `checkpoint.tag_validation` forbids.
            client_state: the caller's own JSON-able values; `load_checkpoint` returns them.
            save_latest: whether `latest` names this checkpoint from now on.
            exclude_frozen_parameters: leave out what is not trained, as for an adapter; loading
                keeps the model's own values of it.

        Atomic: until it is complete, the previous checkpoint stays the one that loads. Collective.
        """
        from ds_core.engine_state import save

        tag = tag or f"step{self.global_step}"
        path = save(
            cast("Engine", self),
            directory,
            agree_on_tag(tag, self._tag_validation, self.mesh.group(*self.mesh.axes)),
            client_state,
            keep_latest_pointer=save_latest,
            exclude_frozen=exclude_frozen_parameters,
        )
        self._emit(EventKind.CHECKPOINT, path=path, action="saved")
        return path

    def load_checkpoint(
        self,
        directory: str | os.PathLike[str],
        tag: str | None = None,
        *,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> dict[str, Any]:
        """Load a checkpoint of any stage and world size; returns its `client_state`.

        Args:
            directory: holds the checkpoints, or is one.
            tag: which one; default: the latest.
            load_module_strict: whether names that only the model or only the checkpoint has are an
                error.
            load_optimizer_states: if False, the optimizer keeps its own state and settings.
            load_lr_scheduler_states: if False, the schedule keeps its place.
            load_module_only: load the weights and nothing else, as from a pretrained model.

        Raises CheckpointError if it is missing, damaged, or of another model; the engine must not
        be used then. Collective.
        """
        from ds_core.engine_state import load

        path, client_state = load(
            cast("Engine", self),
            directory,
            tag,
            strict=load_module_strict,
            optimizer=load_optimizer_states,
            lr_scheduler=load_lr_scheduler_states,
            only_model=load_module_only,
        )
        self._emit(EventKind.CHECKPOINT, path=path, action="loaded")
        return client_state

    def load_pretrained(
        self,
        source: str | os.PathLike[str],
        *,
        rename: Callable[[str], str | None] | None = None,
        strict: bool = True,
    ) -> LoadedWeights:
        """Start from the weights of a Hugging Face folder; each rank reads only what it holds.

        At every stage, also where the model was built under `ds_zero.Init(empty=True)`, so that no
        rank ever has a whole copy. Values go to the most precise copy that there is. The optimizer
        stays as it is.

        Args:
            source: a folder with safetensors (one file, or several with an index), or a file.
            rename: called with each name in the files; returns that in the model, or None for one
                to leave out.
            strict: whether a name that only the model or only the files have is an error.

        Returns what was found, missing and unexpected. Raises CheckpointError on every rank if a
        file is missing or damaged, or of another model. Collective.
        """
        from ds_core.engine_state import load_pretrained

        return load_pretrained(cast("Engine", self), source, rename=rename, strict=strict)

    def save_model(
        self,
        directory: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = 5 * 10**9,
        exclude_frozen_parameters: bool = False,
        overwrite: bool = False,
    ) -> str:
        """Write the model alone, whole, as safetensors that Hugging Face's libraries load.

        Parameter by parameter, so that no rank holds more than the largest one beside its share,
        at every stage. One file, or several with an index. A tied weight is written once.

        Args:
            directory: a folder of rank 0; created.
            dtype: of floating-point tensors; default: as the model has them. fp32 takes the
                optimizer's master copy where there is one.
            max_shard_bytes: largest file, unless one tensor is larger.
            exclude_frozen_parameters: leave out what is not trained.
            overwrite: replace weights that are there already.

        Raises CheckpointError on every rank if rank 0 cannot write. Collective.
        """
        from ds_core.model_export import save_model

        return save_model(
            cast("Engine", self), directory, dtype=dtype, max_shard_bytes=max_shard_bytes,
            exclude_frozen=exclude_frozen_parameters, overwrite=overwrite,
        )  # fmt: skip
