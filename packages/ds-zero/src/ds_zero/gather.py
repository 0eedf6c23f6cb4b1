"""Stage 3 at run time: each unit is whole while a module needs it, and a shard otherwise.

Hooks on the units' modules gather before forward and before backward, free after use, and start the
next gather of the plan early, so that it overlaps the compute. What is issued when is decided by
`GatherOrder`, alike on all ranks.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_core import comm
from ds_core.backward import differentiable_tensors
from ds_zero.errors import ShardError
from ds_zero.order import GatherOrder
from ds_zero.unit import Unit


class UnitState(enum.Enum):
    """Where a unit's full parameters are."""

    SHARDED = enum.auto()  # nowhere on this rank; its parameters are shapes
    ARRIVING = enum.auto()  # a gather is under way, or complete and not used yet
    IN_USE = enum.auto()  # present, and its parameters are ordinary ones


class GatherRuntime:
    """Gathers and frees the units of one model at stage 3.

    Args:
        model: the root module, whose forward and backward delimit a pass. A forward of a part
            alone, such as the model inside a wrapper, is a pass too.
        units: all units of the model, sharded.
        ensure_begun: tells the watch over backwards that one is under way.
        prefetch: how many gathers may be under way or unused beside what is in use.

    Collective: all ranks run forward and backward the same number of times.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[Unit],
        ensure_begun: Callable[[], None],
        *,
        prefetch: int = 1,
    ) -> None:
        self._units = {unit.index: unit for unit in units}
        self._ensure_begun = ensure_begun
        self._prefetch = prefetch
        self._state = dict.fromkeys(self._units, UnitState.SHARDED)
        self._pending: dict[int, comm.Pending] = {}
        self._kept: set[int] = {unit.index for unit in units if unit.is_root}
        self._key: tuple[Any, ...] = ()
        # The part of the model whose forward alone is the pass under way.
        self._part: nn.Module | None = None
        # Units that stay whole whatever passes do; of `hold`, how many ask for it, and of which it
        # is theirs to free them.
        self._held: set[int] = set()
        self._num_holders: dict[int, int] = {}
        self._freed_by_holders: set[int] = set()
        self._model = weakref.ref(model)
        self.in_backward = False
        self._of_param = {id(p): u for u in units for p in u.params}
        control = _control_group(units[0].group)
        # Root units are gathered at the start of every pass, so there is nothing to agree on.
        trivial = all(unit.is_root for unit in units)
        self._order = GatherOrder(
            self._issue,
            lambda value: [value] if trivial else _exchange(control, value),
            lambda values: comm.all_gather_object(values, control, caller="gather order"),
        )
        self._handles: list[Any] = []
        self._install(model)
        for unit in units:
            unit.free(self)

    # ------------------------------------------------------------------ hooks

    def _install(self, model: nn.Module) -> None:
        here = weakref.ref(self)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            runtime = here()
            if runtime is not None:
                runtime._enter_root(module, args, kwargs)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            runtime = here()
            if runtime is not None:
                runtime._leave_root(output)

        add = self._handles.append
        add(
            model.register_forward_pre_hook(
                torch._disable_dynamo(enter), with_kwargs=True, prepend=True
            )
        )
        add(model.register_forward_hook(torch._disable_dynamo(leave), with_kwargs=True))
        for name, part in self._parts(model):
            self._install_on_part(name, part, here)
        of_module: dict[nn.Module, list[Unit]] = {}
        for unit in self._units.values():
            for module in unit.modules:
                if not unit.is_root:
                    of_module.setdefault(module, []).append(unit)
        for module, units in of_module.items():
            self._install_on(module, units, here)

    def _parts(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Modules of several with parameters that are whole throughout a pass, without the root."""
        roots = {id(p) for unit in self._units.values() if unit.is_root for p in unit.params}
        for name, module in model.named_modules():
            is_part = module is not model and next(module.children(), None) is not None
            if is_part and any(id(param) in roots for param in module.parameters()):
                yield name, module

    def _install_on_part(
        self, name: str, part: nn.Module, here: Callable[[], GatherRuntime | None]
    ) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            runtime = here()
            if runtime is not None:
                runtime._enter_part(name, module, args, kwargs)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            runtime = here()
            if runtime is not None:
                runtime._leave_part(module, output)

        add = self._handles.append
        add(
            part.register_forward_pre_hook(
                torch._disable_dynamo(enter), with_kwargs=True, prepend=True
            )
        )
        # Also after an error: what comes next may be another part, which would seem to be inside.
        add(part.register_forward_hook(torch._disable_dynamo(leave), always_call=True))

    def _install_on(
        self, module: nn.Module, units: list[Unit], here: Callable[[], GatherRuntime | None]
    ) -> None:
        last = [unit for unit in units if unit.modules[-1] is module]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            runtime = here()
            if runtime is not None:
                runtime._before_forward(units, (args, kwargs))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            runtime = here()
            if runtime is not None:
                runtime._after_forward(units, last, output)

        self._handles.append(
            module.register_forward_pre_hook(
                torch._disable_dynamo(before), with_kwargs=True, prepend=True
            )
        )
        self._handles.append(module.register_forward_hook(torch._disable_dynamo(after)))

    def close(self) -> None:
        """Remove every hook. Parameters stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ------------------------------------------------------------------ passes

    def _enter_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.in_backward and torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing runs the whole model again
        if self.in_backward or self._order.active:
            self._recover()
        self._begin_forward("", module, args, kwargs)

    def _begin_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if len(self._held) == len(self._units):
            return  # everything is here: nothing to gather, nothing to agree on
        grad = torch.is_grad_enabled()
        self._key = (name, len(args), tuple(sorted(kwargs)), module.training, grad)
        self._order.begin(("forward", *self._key))
        for unit in self._units.values():
            if unit.is_root:
                self.need(unit)

    def _enter_part(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._order.active or self.in_backward:
            return  # inside the root, or computed again for backward
        self._begin_forward(name, module, args, kwargs)
        self._part = module if self._order.active else None

    def _leave_part(self, module: nn.Module, output: Any) -> None:
        if self._part is not module:
            return
        self._part = None
        if output is None:
            self._recover()  # an error, of perhaps one rank: nothing to agree on
        else:
            self._leave_root(output)

    def _leave_root(self, output: Any) -> None:
        if self.in_backward or not self._order.active:
            return
        self._order.end()
        backward_follows = torch.is_grad_enabled() and differentiable_tensors(output)
        self._release_all(keep=self._kept if backward_follows else set())

    def begin_backward(self) -> None:
        """Called in the backward of the model's outputs, before that of any unit."""
        if self.in_backward:
            return
        self.in_backward = True
        if self._order.active:
            self._recover()
        if len(self._held) == len(self._units):
            return
        self._order.begin(("backward", *self._key))
        for index in sorted(self._kept):
            self.need(self._units[index])

    def end_backward(self) -> None:
        """Called once the whole backward is done: free everything."""
        if not self.in_backward:
            return
        if self._order.active:
            self._order.end()
        self.in_backward = False
        self._release_all(keep=set())

    def _recover(self) -> None:
        """An exception ended the previous pass on the way: start from a clean state."""
        self._order.abandon()
        self.in_backward = False
        self._part = None
        self._release_all(keep=set())

    def _release_all(self, keep: set[int]) -> None:
        for unit in self._units.values():
            if unit.index not in keep and unit.index not in self._held:
                self._release(unit)

    def settle(self) -> None:
        """Free what a forward without a backward left whole, so that all ranks are alike."""
        self._release_all(keep=set())

    # ------------------------------------------------------------------ units

    def _before_forward(self, units: list[Unit], inputs: Any) -> None:
        for unit in units:
            self.need(unit)
        frozen = [unit for unit in units if not unit.trainable]
        if frozen and torch.is_grad_enabled():
            # Nothing accumulates in a frozen unit: it has served its backward when the gradient of
            # the module's input is known.
            here, weak = weakref.ref(self), [weakref.ref(unit) for unit in frozen]

            def served(_: torch.Tensor) -> None:
                runtime = here()
                if runtime is not None and runtime.in_backward:
                    for unit in filter(None, (ref() for ref in weak)):
                        runtime.release(unit)

            for tensor in differentiable_tensors(inputs)[:1]:
                tensor.register_hook(served)

    def _after_forward(self, units: list[Unit], last: list[Unit], output: Any) -> None:
        if torch.is_grad_enabled():
            here, weak = weakref.ref(self), [weakref.ref(unit) for unit in units]

            def before_backward(_: torch.Tensor) -> None:
                runtime = here()
                if runtime is not None:
                    runtime._ensure_begun()
                    for unit in filter(None, (ref() for ref in weak)):
                        runtime.need(unit)

            for tensor in differentiable_tensors(output):
                tensor.register_hook(before_backward)
        for unit in last:
            # In a backward this forward is a recomputation, and its backward comes next: after
            # those of all other tiles, where it is one of them.
            if not self.in_backward or unit.is_tile:
                self.release(unit)

    def need(self, unit: Unit) -> None:
        """Make the parameters of `unit` present, and start the next gather of the plan."""
        if self._state[unit.index] is UnitState.IN_USE:
            return
        if not self._order.active:
            # Outside a pass of the root module nothing is agreed: all ranks must do the same.
            if self._state[unit.index] is UnitState.SHARDED:
                self._issue(unit.index)
        elif self._state[unit.index] is UnitState.ARRIVING:
            self._order.note(unit.index)
        else:
            self._order.need(unit.index)
        self._arrive(unit)
        while len(self._pending) < self._prefetch and not self._waits_for_release():
            if self._order.ahead() is None:
                break
        self._fetch_ahead()

    def _fetch_ahead(self) -> None:
        """Begin to fetch the shards that live on disk of the units that are gathered next."""
        for index in self._order.upcoming(max(1, self._prefetch)):
            self._units[index].fetch_ahead()

    def _waits_for_release(self) -> bool:
        """Whether what comes next in the plan is a unit in use, which will be freed before."""
        return any(
            self._state[index] is UnitState.IN_USE
            for index in self._order.upcoming(1)
            if index not in self._held and index not in self._kept
        )

    def release(self, unit: Unit) -> None:
        """The parameters of `unit` are not needed for now."""
        if unit.index not in self._held and unit.index not in self._kept:
            self._release(unit)

    def _issue(self, index: int) -> None:
        unit = self._units[index]
        if self._state[index] is UnitState.ARRIVING:
            self._pending.pop(index).wait()
        pending = unit.start_gather()
        if self._state[index] is UnitState.IN_USE:
            # Others want it: serve them; our own values are overwritten by the same ones.
            pending.wait()
            return
        self._pending[index] = pending
        self._state[index] = UnitState.ARRIVING

    def _arrive(self, unit: Unit) -> None:
        issued = list(self._pending)
        self._pending.pop(unit.index).wait()
        unit.show()
        self._state[unit.index] = UnitState.IN_USE
        for passed in issued[: issued.index(unit.index)]:
            # Gathered before this one and not used: only other ranks needed it.
            self._release(self._units[passed])

    def _release(self, unit: Unit) -> None:
        if self._state[unit.index] is UnitState.SHARDED:
            return
        pending = self._pending.pop(unit.index, None)
        if pending is not None:
            pending.wait()
        self._state[unit.index] = UnitState.SHARDED
        unit.free(self)

    # ------------------------------------------------------------------ use outside the hooks

    #: `Keeper`: the memory of a unit goes when its use ends.
    values_stay = False

    @property
    def detaches_later(self) -> bool:
        """`Keeper`: outside passes, where nothing is gathered on touch."""
        return not (self._order.active or self.in_backward)

    def touch(self, params: list[nn.Parameter], operation: str) -> None:
        """A sharded parameter is used where no hook foresaw it (Keeper protocol).

        Within a pass its unit is gathered now, and from now on kept whole in every pass, because
        what uses it outside its module may save it for backward. Outside a pass it is an error.
        """
        units = {self._of_param[id(param)] for param in params}
        if not (self._order.active or self.in_backward):
            names = [s.name for u in units for s in u.specs if any(s.param is p for p in params)]
            raise ShardError(
                f"parameter {names[0]!r} is sharded (ZeRO stage 3) and {operation} needs its "
                f"values: use `with ds_zero.GatheredParameters(param):` on all ranks, or "
                f"optimizer.full_parameter({names[0]!r}); for a whole model, "
                f"optimizer.full_state_dict()"
            )
        for unit in sorted(units, key=lambda u: u.index):
            self._kept.add(unit.index)
            self.need(unit)

    @contextmanager
    def hold(self, units: list[Unit] | None = None) -> Iterator[None]:
        """Keep units whole inside the block: to read or edit them, or for many forwards.

        Collective: all ranks enter with the same units.
        """
        chosen = list(self._units.values()) if units is None else units
        gathered = [u for u in chosen if self._state[u.index] is UnitState.SHARDED]
        for unit in gathered:
            self._issue(unit.index)
        for unit in gathered:
            self._arrive(unit)
        self._freed_by_holders |= {unit.index for unit in gathered}
        for unit in chosen:
            if unit.index not in self._held:
                self._held.add(unit.index)
                self._num_holders[unit.index] = 1
            elif unit.index in self._num_holders:
                self._num_holders[unit.index] += 1
        try:
            yield
        finally:
            for unit in chosen:
                self._leave(unit)

    def _leave(self, unit: Unit) -> None:
        """One of those who hold a unit does no more; the last one frees it."""
        if unit.index not in self._num_holders:
            return  # whoever else keeps it was there first
        self._num_holders[unit.index] -= 1
        if self._num_holders[unit.index] == 0:
            del self._num_holders[unit.index]
            self._held.discard(unit.index)
            if unit.index in self._freed_by_holders:
                self._freed_by_holders.discard(unit.index)
                self._release(unit)

    def remove_hooks(self) -> None:
        """Leave the model without hooks until `restore_hooks`: nothing is gathered on use."""
        self.close()

    def restore_hooks(self) -> None:
        """Put the hooks back; nothing if they are there."""
        model = self._model()
        if not self._handles and model is not None:
            self._install(model)

    @contextmanager
    def keep(self, units: list[Unit]) -> Iterator[None]:
        """Units that a forward inside the block gathers stay whole until its end."""
        newly = {u.index for u in units if self._state[u.index] is not UnitState.IN_USE}
        newly -= self._held
        self._held |= newly
        try:
            yield
        finally:
            self._held -= newly
            for index in sorted(newly):
                if not self.in_backward:  # there, what was computed again has its backward next
                    self.release(self._units[index])


def _control_group(group: comm.Group) -> comm.Group:
    """Where hosts exchange a few integers: on gloo whatever the device."""
    if group.backend in ("gloo", "none", "fake"):
        return group
    pg = dist.new_group(list(group.ranks), backend="gloo", use_local_synchronization=True)
    return comm.Group(f"{group.name} (gather order)", group.ranks, pg, group.ledger)


def _exchange(control: comm.Group, value: int) -> list[int]:
    mine = torch.tensor([value], dtype=torch.int64)
    everybody = torch.empty(control.size, dtype=torch.int64)
    comm.all_gather(everybody, mine, control, caller="gather order")
    return [int(answer) for answer in everybody.tolist()]
