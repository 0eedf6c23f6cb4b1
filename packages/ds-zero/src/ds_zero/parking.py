"""Parking: all of a kind of state leaves its memory between two phases, and comes back as it was.

Between the phases of a job (to generate with the weights that were just trained, say) the memory
of states that rest is needed for something else. What is parked has no memory; its tensors, and
whoever has views of them, stay, and see the same bits again after the return.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ds_core import comm
from ds_core.optimizer_state import is_wide
from ds_core.seams import TensorFile
from ds_zero.errors import ShardError
from ds_zero.offload.buffers import whole_pages
from ds_zero.offload.choice import Tier
from ds_zero.offload.crossing import host_empty
from ds_zero.sharded_param import hide

if TYPE_CHECKING:
    from ds_zero.optimizer import ZeroOptimizer
    from ds_zero.unit import Unit

logger = logging.getLogger(__name__)

#: What may be parked, as DeepSpeed calls it.
KINDS = ("optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer")


class _Place:
    """Where one storage's bytes wait: in host memory, or in a file."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage, self.nbytes = storage, storage.nbytes()
        self.host: torch.Tensor | None = None
        self.offset = 0

    def bytes(self) -> torch.Tensor:
        """All bytes of the storage, `[nbytes]`."""
        empty = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        return empty.set_(self.storage)


class Parking:
    """What of a sharded model is parked.

    Args:
        optimizer: whose state it is.
        model: that it shards.
    """

    def __init__(self, optimizer: ZeroOptimizer, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, weakref.ref(model)
        self._guard: RemovableHandle | None = None
        self._places: list[_Place] = []
        self._file: TensorFile | None = None
        #: The kinds that are parked.
        self.kinds: frozenset[str] = frozenset()

    # ------------------------------------------------------------------ going and coming

    def park(
        self,
        include: Iterable[str] | None,
        device: str,
        *,
        pin_memory: bool,
        non_blocking: bool,
        folder: str | None,
    ) -> None:
        """See `ZeroOptimizer.offload_states`."""
        kinds = _checked(include, device)
        self.refuse("offload_states", {*KINDS})
        optimizer = self._optimizer
        if device == "device":
            return
        if device == "cpu" and not optimizer._homes.leaves_device:
            logger.warning(
                'offload_states: the model is in host memory already, so device="cpu" moves '
                'nothing; device="nvme" does'
            )
            return
        complaint: str | None = None
        optimizer.settle_states()
        try:
            if device == "nvme":
                self._file = optimizer._homes.open_parking(folder)
            for storage in self._storages(kinds):
                self._leave(storage, pin_memory=pin_memory, non_blocking=non_blocking)
            self._hide(kinds)
        except (ShardError, OSError, RuntimeError) as error:
            complaint = str(error)
        group = optimizer.mesh.group("dp")
        found = comm.all_gather_object(complaint, group, caller="offload_states")
        wrong = [text for text in found if text is not None]
        self.kinds = kinds
        if wrong:
            self.bring_back(non_blocking=False)
            raise ShardError(f"offload_states: nothing was moved, on any rank: {wrong[0]}")

    def bring_back(self, *, non_blocking: bool) -> None:
        """See `ZeroOptimizer.reload_states`."""
        while self._places:
            place = self._places[-1]
            place.storage.resize_(place.nbytes)
            target = place.bytes()
            if place.host is not None:
                target.copy_(place.host, non_blocking=non_blocking)
            elif self._file is not None:
                staged = target if target.device.type == "cpu" else torch.empty_like(target).cpu()
                self._file.read(staged, place.offset).wait()
                if staged is not target:
                    target.copy_(staged)
            self._places.pop()
        if self._file is not None:
            self._file.close()
            self._file = None
        if "lp_params" in self.kinds:
            self._show()
        self.kinds = frozenset()

    def _leave(
        self, storage: torch.UntypedStorage, *, pin_memory: bool, non_blocking: bool
    ) -> None:
        place = _Place(storage)
        source = place.bytes()
        if self._file is not None:
            if self._places:
                last = self._places[-1]
                place.offset = whole_pages(last.offset + last.nbytes)
            self._file.preallocate(place.offset + place.nbytes)
            self._file.write(source.cpu(), place.offset).wait()
        else:
            place.host = host_empty(place.nbytes, torch.uint8, pin=pin_memory)
            # The device's memory goes to others in the order of its stream: after the copy.
            place.host.copy_(source, non_blocking=non_blocking)
        self._places.append(place)
        storage.resize_(0)

    # ------------------------------------------------------------------ what goes

    def _storages(self, kinds: frozenset[str]) -> Iterator[torch.UntypedStorage]:
        """Each storage once, of those that have memory where the model computes."""
        seen: set[int] = set()
        here = self._optimizer.units[0].full.device
        for tensor in self._tensors(kinds):
            storage = tensor.untyped_storage()
            if storage._cdata in seen or storage.nbytes() == 0 or tensor.device != here:
                continue
            seen.add(storage._cdata)
            yield storage

    def _tensors(self, kinds: frozenset[str]) -> Iterator[torch.Tensor]:
        for unit in self._optimizer.units:
            if "lp_params" in kinds:
                yield unit.shard if unit.stage == 3 else unit.full
            if "hp_params" in kinds and unit.master is not None:
                yield unit.master
            if unit.trainable and kinds & {"lp_grads", "contiguous_grad_buffer"}:
                yield from self._gradients(unit, kinds)
            # What is on disk already has no memory.
            resident = "optim_states" in kinds and unit.states != "nvme"
            for piece in unit.optimizer_pieces if resident else ():
                for value in self._optimizer.state.get(piece.weights, {}).values():
                    if is_wide(value):
                        yield value

    @staticmethod
    def _gradients(unit: Unit, kinds: frozenset[str]) -> Iterator[torch.Tensor]:
        """The averaged gradient, and the buffer that it is a part of at stage 1."""
        in_buffer = unit.grad.untyped_storage()._cdata == unit.twin.flat.untyped_storage()._cdata
        if "lp_grads" in kinds or in_buffer:
            yield unit.grad
        if "contiguous_grad_buffer" in kinds:
            yield unit.twin.flat

    def _hide(self, kinds: frozenset[str]) -> None:
        model = self._model()
        if "lp_params" in kinds and model is not None:
            # Before the hooks of stage 3, which would begin a pass on all ranks.
            self._guard = model.register_forward_pre_hook(self._refuse_forward, prepend=True)
        for param in self._whole_params() if "lp_params" in kinds else ():
            hide(param, self)

    def _show(self) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None
        for unit in self._optimizer.units:
            if unit.stage < 3:
                unit.show()

    def _whole_params(self) -> Iterator[nn.Parameter]:
        """Parameters that are whole between steps; those of stage 3 are hidden anyway."""
        for unit in self._optimizer.units:
            if unit.stage < 3:
                yield from unit.params

    # ------------------------------------------------------------------ refusals

    def refuse(self, operation: str, needs: Iterable[str]) -> None:
        """Raise ShardError if something that an operation needs is parked."""
        missing = self.kinds & set(needs)
        if missing:
            self._raise(operation, missing)

    def _refuse_forward(self, module: nn.Module, inputs: Any) -> None:
        self._raise("forward", {"lp_params"})

    detaches_later, values_stay = True, False

    def touch(self, params: list[nn.Parameter], operation: str) -> None:
        """A parked parameter is used (Keeper protocol)."""
        self._raise(operation, {"lp_params"})

    @staticmethod
    def _raise(operation: str, missing: Iterable[str]) -> NoReturn:
        raise ShardError(
            f"{operation}: {', '.join(sorted(missing))} are parked by offload_states(); call "
            f"reload_states() first, on all ranks"
        )


def _checked(include: Iterable[str] | None, device: str) -> frozenset[str]:
    if device not in get_args(Tier):
        raise ShardError(
            f"offload_states: device: got {device!r}, expected one of "
            f"{', '.join(map(repr, get_args(Tier)))}"
        )
    if isinstance(include, str):
        include = [include]
    # DeepSpeed's names are members of an enum whose values are these strings.
    given = KINDS if include is None else include
    names = [str(getattr(each, "value", each)) for each in given]
    unknown = sorted(set(names) - set(KINDS))
    if unknown:
        raise ShardError(
            f"offload_states: include: got {', '.join(map(repr, unknown))}, expected some of "
            f"{', '.join(KINDS)}"
        )
    return frozenset(names)
