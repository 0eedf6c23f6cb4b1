"""What an engine saves and loads: its model, and checkpoints of everything."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ds_core import comm
from ds_core.agreement import TagValidation, agree_on_tag
from ds_core.buffers import persistent_buffers
from ds_core.errors import TornError
from ds_core.seams import EventKind, Sharding

if TYPE_CHECKING:
    from ds_core.accumulation import Accumulation
    from ds_core.checkpoint import AsyncSaver, LoadedWeights, PendingSave
    from ds_core.checkpoint.lazy import LazyStateDict
    from ds_core.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavePolicy:
    """How an engine saves checkpoints; the section `checkpoint` of its configuration.

    Attributes:
        tag_validation: what happens where ranks name one differently.
        asynchronous: whether training goes on while they are written.
        keep_last: how many stay; None: all.
        shows_figures: whether rank 0 logs size and time of each asynchronous one.
    """

    tag_validation: TagValidation = "Warn"
    asynchronous: bool = False
    keep_last: int | None = None
    shows_figures: bool = False


class ReadsInFlight:
    """Called before parameters or state change: waits for a save that still reads them.

    Apart from the engine, so that a sharding that has it does not keep the engine alive.

    Attributes:
        saver: who saves, once somebody does.
    """

    saver: AsyncSaver | None = None

    def __call__(self) -> None:
        if self.saver is not None:
            self.saver.wait_for_reads()


def told_of_torn(by_rank: Sequence[str | None]) -> str | None:
    """What the first rank that is torn tells; None if none is."""
    torn = [(rank, reason) for rank, reason in enumerate(by_rank) if reason is not None]
    if not torn:
        return None
    rank, reason = torn[0]
    return reason if len(by_rank) == 1 else f"rank {rank}: {reason}"


class EngineFiles(nn.Module):
    """The half of an `Engine` that concerns files; the other half trains."""

    module: nn.Module
    sharding: Sharding
    mesh: comm.Mesh
    global_step: int
    _micro: Accumulation
    _saving: SavePolicy
    _reads: ReadsInFlight
    _pending: PendingSave | None = None

    if TYPE_CHECKING:

        def _emit(self, kind: EventKind, /, **values: Any) -> None: ...

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's parameters and buffers, whole on every rank, copied to the CPU.

        The names are those of the model's own `state_dict`, so that it loads without an engine.
        Raises TornError on every rank if an error ended a step in the middle.
        """
        self._refuse_torn_anywhere("state_dict")
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

        Raises CheckpointError if names (unless `strict` is false) or shapes differ, and TornError
        if an error ended a step in the middle, which has left the optimizer of no use. Collective.
        """
        from ds_core.engine_state import load_model

        self._refuse_torn_anywhere("load_state_dict")
        self._reads()
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
        asynchronous: bool | None = None,
        keep_last: int | None = None,
    ) -> str:
        """Save everything needed to go on, at any stage and world size; returns the path.

        Args:
            directory: shared by all ranks; a URL such as "s3://bucket/run" with the extra
                `ds-core[fsspec]`.
            tag: name of this checkpoint; default: "step" and the step's number. Where ranks pass
                different ones, that of rank 0 counts, unless `checkpoint.tag_validation` forbids.
            client_state: the caller's own JSON-able values; `load_checkpoint` returns them.
            save_latest: whether `latest` names this checkpoint from now on.
            exclude_frozen_parameters: leave out what is not trained, as for an adapter; loading
                keeps the model's own values of it.
            asynchronous: return once the state is copied to host memory, and write it while
                training goes on. The checkpoint is there when it is complete; the next save,
                `load_checkpoint`, `wait_for_checkpoint` and `close` wait for it, and raise what
                went wrong. Default: `checkpoint.asynchronous` of the configuration.
            keep_last: delete all complete checkpoints in the directory but so many of the newest,
                the one that `latest` names, and any that is in use. Default: `checkpoint.keep_last`
                of the configuration, and that none is deleted.

        Atomic: until it is complete, the previous checkpoint stays the one that loads. Gradients
        are not part of it: between a backward and the end of its step it warns, and raises DsError
        if backward has updated parameters already (update_in_backward). Raises TornError on every
        rank if an error ended a step in the middle. Collective.
        """
        from ds_core import checkpoint
        from ds_core.engine_state import state_to_save

        self._refuse_torn_anywhere("save_checkpoint")
        self._micro.warn_of_loss("save_checkpoint")
        self.wait_for_checkpoint()
        tag = tag or f"step{self.global_step}"
        tag = agree_on_tag(tag, self._saving.tag_validation, self.mesh.group(*self.mesh.axes))
        options: dict[str, Any] = {
            "keep_latest_pointer": save_latest,
            "keep_last": self._saving.keep_last if keep_last is None else keep_last,
        }
        state = state_to_save(
            cast("Engine", self), client_state, exclude_frozen=exclude_frozen_parameters
        )
        if self._saving.asynchronous if asynchronous is None else asynchronous:
            saver = self._reads.saver
            if saver is None:
                patience = self.mesh.group(*self.mesh.axes).timeout
                timeout_s = None if patience is None else patience.total_seconds()
                saver = self._reads.saver = checkpoint.AsyncSaver(timeout_s=timeout_s)
            self._pending = saver.save(directory, tag, state, **options)
            self._emit(EventKind.CHECKPOINT, path=str(self._pending.path), action="being written")
            return str(self._pending.path)
        path = str(checkpoint.save(directory, tag, state, **options))
        self._emit(EventKind.CHECKPOINT, path=path, action="saved")
        return path

    def wait_for_checkpoint(self) -> str | None:
        """The path of the checkpoint that was being written, once it is complete; None if none was.

        Raises CheckpointError, on every rank, if it failed. Collective.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        path = str(pending.wait())
        if self._saving.shows_figures and self.mesh.group(*self.mesh.axes).rank == 0:
            _log_figures(pending)
        self._emit(EventKind.CHECKPOINT, path=path, action="saved")
        return path

    def _refuse_torn(self, what: str, torn: str | None = None) -> None:
        """Raise TornError if parameters and state are of different steps, here or as `torn` says.

        Costs no message. Where other ranks are whole, they end with an error when this one does
        not come to what they do together.
        """
        reason = torn or self.sharding.torn
        if reason is not None:
            raise TornError(
                f"{what}: parameters and optimizer state do not belong to one step ({reason}); "
                f"load a checkpoint with its optimizer state (engine.load_checkpoint) or start anew"
            )

    def _refuse_torn_anywhere(self, what: str) -> None:
        """As `_refuse_torn`, on every rank if any is torn. Collective."""
        group = self.mesh.group(*self.mesh.axes)
        by_rank = comm.all_gather_object(self.sharding.torn, group, caller=what)
        self._refuse_torn(what, told_of_torn(by_rank))

    def _close_saver(self) -> None:
        try:
            self.wait_for_checkpoint()
        finally:
            if self._reads.saver is not None:
                self._reads.saver.close()

    def load_checkpoint(
        self,
        directory: str | os.PathLike[str],
        tag: str | None = None,
        *,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        verify: bool = False,
        place_weights: Callable[[LazyStateDict], None] | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint of any stage and world size; returns its `client_state`.

        One that DeepSpeed wrote (ZeRO stages 0 to 3, universal) is loaded as well: rank 0 imports
        it into a folder beside it, which is gone afterwards. What of its client state only running
        code could read is left out.

        Args:
            directory: holds the checkpoints, or is one.
            tag: which one; default: the latest.
            load_module_strict: whether names that only the model or only the checkpoint has are an
                error.
            load_optimizer_states: if False, the optimizer keeps its own state and settings.
            load_lr_scheduler_states: if False, the schedule keeps its place.
            load_module_only: load the weights and nothing else, as from a pretrained model.
            verify: compare the whole checkpoint with its checksums before anything is changed;
                without it, each rank verifies what it reads, as it reads it.
            place_weights: called, last of all, with the checkpoint's weights by name, each read
                when it is looked up; it puts them into the model, which keeps its own otherwise.
                For weights that are named or cut otherwise than the model's.

        Raises CheckpointError if it is missing, damaged, or of another model; the engine must not
        be used then: steps and saves raise TornError until a load succeeds. So they do after an
        error that ended a step in the middle; then only a load with the optimizer's states puts
        things right, and without them it raises TornError. Collective.
        """
        from ds_core.checkpoint.foreign_load import as_ours
        from ds_core.engine_state import load

        if load_module_only or not load_optimizer_states:
            self._refuse_torn_anywhere("load_checkpoint without optimizer states")
        self.wait_for_checkpoint()
        with_states = load_optimizer_states and not load_module_only
        with as_ours(directory, tag, optimizer=with_states) as imported:
            path, client_state = load(
                cast("Engine", self),
                directory if imported is None else imported,
                tag if imported is None else None,
                strict=load_module_strict,
                optimizer=load_optimizer_states,
                lr_scheduler=load_lr_scheduler_states,
                only_model=load_module_only,
                verify=verify,
                place_weights=place_weights,
            )
        if imported is not None:
            path = os.fspath(directory)
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
        file is missing or damaged, or of another model, and TornError as `load_state_dict` does.
        Collective.
        """
        from ds_core.engine_state import load_pretrained

        self._refuse_torn_anywhere("load_pretrained")
        self._reads()
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

        Raises CheckpointError on every rank if rank 0 cannot write, and TornError if an error
        ended a step in the middle. Collective.
        """
        from ds_core.model_export import save_model

        self._refuse_torn_anywhere("save_model")
        return save_model(
            cast("Engine", self), directory, dtype=dtype, max_shard_bytes=max_shard_bytes,
            exclude_frozen=exclude_frozen_parameters, overwrite=overwrite,
        )  # fmt: skip


def _log_figures(pending: PendingSave) -> None:
    told = pending.figures
    rate = told.copied_bytes / max(told.write_s, 1e-9) / 1e6
    logger.info(
        "checkpoint %s: rank 0 copied %.1f MB in %.3f s (training waited %.3f s in all) and wrote "
        "them in %.3f s, %.0f MB/s",
        pending.path, told.copied_bytes / 1e6, told.copy_s, told.blocked_s, told.write_s, rate,
    )  # fmt: skip
