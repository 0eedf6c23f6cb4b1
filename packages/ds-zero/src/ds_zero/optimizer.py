"""The optimizer that a user sees: their own, stepping on this rank's share of a sharded model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_core import comm
from ds_core.backward import BackwardWatch
from ds_core.gradients import GradientReducer
from ds_core.seams import change_freely
from ds_zero import checks
from ds_zero.agreement import Agreement, agree
from ds_zero.building import build_units, checked_memory
from ds_zero.choices import Choices
from ds_zero.errors import ShardError
from ds_zero.gather import GatherRuntime
from ds_zero.held_values import HeldValues
from ds_zero.host_steps.chosen import chosen_step
from ds_zero.memory_plan import MemoryPlan
from ds_zero.offload.homes import Homes
from ds_zero.owners import disown
from ds_zero.parking import KINDS, Parking
from ds_zero.plan import UnitSpec, plan_units
from ds_zero.released import Released
from ds_zero.sharded_param import show_class
from ds_zero.unit import Unit
from ds_zero.wholeness import Trouble, Wholeness

#: Kinds of parked state without which gradients cannot be read or written.
_GRADIENTS = ("lp_grads", "contiguous_grad_buffer")


class ZeroOptimizer(HeldValues):
    """A `torch.optim.Optimizer` over a model that is sharded over ranks; made by `ds_zero.shard`.

    `loss.backward()` averages gradients over ranks while it runs; `step()` updates this rank's
    share and publishes it. After a backward the model's own `.grad` are None: the gradients are
    sharded. Clip with `max_grad_norm=` or `clip_grad_norm_`, read with `full_gradient`.

    Collective: construction, backward, `step` and every method that says so.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        mesh: comm.Mesh,
        choices: Choices,
    ) -> None:
        specs = checks.parameters_of(model, optimizer, mesh.group("dp"))
        self._inner = optimizer
        self.__setstate__({"defaults": optimizer.defaults})
        self.stage, self.mesh = choices.stage, mesh
        self.max_grad_norm = choices.max_grad_norm
        self.updates_in_backward = choices.update_in_backward
        plan = plan_units(
            model,
            specs,
            units=choices.units,
            leaves=choices.leaf_modules,
            min_unit_numel=choices.min_unit_numel,
        )
        #: What this rank was found to need, if that was checked.
        self.memory_plan: MemoryPlan | None = None
        if choices.check_memory:
            self.memory_plan = checked_memory(plan, optimizer, mesh, choices)
        self._hold(model, plan, choices)
        self._listen(model, choices)
        self._pending_scale: float | torch.Tensor = 1.0

    def _hold(self, model: nn.Module, plan: list[UnitSpec], choices: Choices) -> None:
        """Lay out and take over what this rank holds."""
        device = plan[0].params[0].param.device
        self._homes = Homes(choices.offload, device, dist.get_rank())
        if self.memory_plan is not None:
            self._homes.tell_speed(self.memory_plan.files, self.memory_plan.room)
        self.before_change = change_freely
        self.units = build_units(plan, self._inner, self.mesh, self._homes, choices)
        self._trainable = [unit for unit in self.units if unit.trainable]
        self._parking = Parking(self, model)
        self._host_step = chosen_step(
            self._inner,
            self._trainable,
            self._homes,
            group=self.mesh.group("dp"),
            update_in_backward=choices.update_in_backward,
            zenflow=choices.zenflow,
            before_change=lambda: self.before_change(),
        )
        self._wholeness = Wholeness([self._homes, self._host_step], device)

    def _listen(self, model: nn.Module, choices: Choices) -> None:
        """Put hooks on the model, which gather parameters and take gradients."""
        self._watch = BackwardWatch(model, self._begin_backward, self._end_backward)
        self._gather: GatherRuntime | None = None
        sharded = [unit for unit in self.units if unit.stage == 3]
        if sharded:
            self._gather = GatherRuntime(
                model, sharded, self._watch.ensure_begun, prefetch=choices.prefetch
            )
        self._reducer = GradientReducer(
            self._trainable,
            self._watch.ensure_begun,
            self._gradients_complete,
            gathers_meanwhile=self._gather is not None,
        )
        # Stages 2 and 3 reduce each micro-batch, so as not to hold full-size gradients; so does
        # stage 1 if gradients accumulate in a wider dtype than they have.
        self.reduces_each_backward = not choices.update_in_backward and (
            self.stage >= 2 or any(unit.grad_dtype != unit.dtype for unit in self._trainable)
        )

    def __str__(self) -> str:
        group = self.units[0].group
        return f"ZeRO stage {self.stage}, {len(self.units)} units over {group.size} ranks"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: units are laid out when the model is sharded."""
        checks.refuse_new_group()

    # ------------------------------------------------------------------ backward

    @property
    def expected_scale(self) -> float | None:
        """What the coming backward's gradients will be multiplied by, unless they are clipped.

        None: more backwards follow before the step. Matters only to an optimizer that speculates.
        """
        return self._host_step.expected_scale

    @expected_scale.setter
    def expected_scale(self, value: float | None) -> None:
        self._host_step.expected_scale = value

    def _begin_backward(self) -> None:
        needs = KINDS if self.updates_in_backward else {"lp_params", *_GRADIENTS}
        self._parking.refuse("backward", needs)
        self._agreed = None
        self._host_step.begin_backward()
        self._reducer.begin()
        if self._gather is not None:
            self._gather.begin_backward()

    def _end_backward(self) -> None:
        if self._gather is not None:
            self._gather.end_backward()
        self._reducer.finish()
        self._host_step.end_backward()

    def _gradients_complete(self, unit: Unit) -> None:
        if self._gather is not None and unit.stage == 3:
            self._gather.release(unit)
        if self._reducer.sync:
            self._host_step.gradient_complete()

    @property
    def accumulate_locally(self) -> bool:
        """Whether backwards leave out the reduction for now."""
        return not self._reducer.sync

    @accumulate_locally.setter
    def accumulate_locally(self, value: bool) -> None:
        self._reducer.sync = not value

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside accumulate locally; the first one outside reduces everything.

        Legal at every stage; at stages 2 and 3 it keeps full-size gradients meanwhile, in the
        dtype of the parameters.
        """
        return self._reducer.no_sync()

    def reduce_local(self) -> None:
        """Average the gradients that only accumulated locally. Collective."""
        self._parking.refuse("reduce_local", _GRADIENTS)
        self._agreed = None
        self._reducer.settle()

    # ------------------------------------------------------------------ step

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """Global L2 norm of the averaged gradients, a float64 scalar equal on all ranks.

        Infinite or NaN if any gradient on any rank is. Collective, once per backward.

        Raises ShardError on every rank if one of them cannot take the step, or has `torn` one.
        """
        self._parking.refuse("grad_norm", _GRADIENTS)
        self._reducer.settle()
        norm = self._agree(with_norm=True).norm
        assert norm is not None
        return norm

    def _agree(self, *, with_norm: bool) -> Agreement:
        """What all ranks know of the gradients; asked once. Raises what made work ahead fail."""
        if self._is_released:
            raise ShardError("release() has ended training: shard the model anew to go on")
        if self._agreed is not None and not (with_norm and self._agreed.norm is None):
            return self._agreed
        known, trouble = self._host_step.known(), self._wholeness.trouble
        if trouble is None and known.failure is not None:
            what = f"{type(known.failure).__name__}: {known.failure}"
            trouble = Trouble(f"a step ahead failed, and was undone: {what}", is_torn=False)
        try:
            self._agreed = agree(
                self._trainable,
                with_norm=with_norm,
                squares=known.squares,
                updated=known.updated,
                trouble=trouble,
            )
        except ShardError as error:
            if known.failure is not None:
                raise known.failure from error
            raise
        self._host_step.judge(self._agreed)
        return self._agreed

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the next step's gradients so that their global L2 norm is at most `max_norm`.

        Returns the norm before clipping. The scaling itself happens inside the next `step`, in the
        pass that reads the gradients anyway. Collective.
        """
        norm = self.grad_norm()
        # NaN stays NaN, as torch's own clipping has it.
        ratio = max_norm / (float(norm) + 1e-6)
        self._pending_scale = 1.0 if ratio > 1.0 else ratio
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters with the averaged gradients, clipped if asked for. Collective.

        Returns what `closure` (which recomputes the loss) returned, if one was given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.max_grad_norm is not None:
            self.clip_grad_norm_(self.max_grad_norm)
        scale, self._pending_scale = self._pending_scale, 1.0
        self.update(scale)
        return loss

    @torch.no_grad()
    def update(self, grad_scale: float | torch.Tensor = 1.0) -> None:
        """Step with gradients multiplied by `grad_scale`, and publish the new parameters.

        Unit by unit, so that the gathers of one overlap the arithmetic of the next. A parameter
        that no rank used keeps its value and state, as in plain PyTorch. Collective.

        Raises ShardError on every rank if one has `torn` a step. An error in the middle of this
        one tears it: it is raised on its rank, and the next step or save on the others.
        """
        self._parking.refuse("update", KINDS)
        self.before_change()
        if self._gather is not None:
            self._gather.settle()
        self._reducer.settle()
        agreed = self._agree(with_norm=self.updates_in_backward)
        try:
            self._host_step.update(agreed, grad_scale)
        except BaseException:
            self._agreed = None  # who steps again asks again
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients. Their persistent buffers stay; nothing is written."""
        self._parking.refuse("zero_grad", _GRADIENTS)
        self._agreed = None
        self._reducer.forget()
        self._host_step.forget(is_torn=self.torn is not None)

    @property
    def host_ratio(self) -> float:
        """Share of the trained elements that step on the host; with ratio "auto" it is found."""
        on_host = sum(u.layout.numel for u in self._trainable if u.states != "device")
        return on_host / max(1, sum(unit.layout.numel for unit in self._trainable))

    def first_nonfinite(self) -> str | None:
        """Name of the first parameter of which this rank's share has a non-finite gradient."""
        self._parking.refuse("first_nonfinite", _GRADIENTS)
        for unit in self._trainable:
            unit.settle_gradient()
            for piece in unit.layout.pieces(unit.group.rank) if unit.has_grad else ():
                stop = piece.offset + piece.stop - piece.start
                if not bool(torch.isfinite(unit.grad[piece.offset : stop]).all()):
                    return piece.slot.name
        return None

    # ------------------------------------------------------------------ parameters as a whole

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """What `model.state_dict()` would hold unsharded, parameters only, copied to the CPU.

        Gathers unit by unit. Collective.
        """
        self._parking.refuse("full_state_dict", {"lp_params"})
        found: dict[str, torch.Tensor] = {}
        for unit in self.units:
            with self.hold_units([unit]):
                for spec in unit.specs:
                    found[spec.name] = spec.param.detach().to("cpu", copy=True)
        return found

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold the whole model on every rank inside the block, as for generation. Collective.

        Forwards inside communicate nothing. Costs the memory of the full parameters.
        """
        self._parking.refuse("gathered", {"lp_params"})
        if self._gather is None:
            yield
            return
        with self._gather.hold():
            yield

    def remove_hooks(self) -> None:
        """Take the hooks that gather parameters off the model, until `restore_hooks`.

        Inside `gathered()` nothing needs them, and generation or torch.compile finds a plain model.
        """
        if self._gather is not None:
            self._gather.remove_hooks()

    def restore_hooks(self) -> None:
        """Undo `remove_hooks`."""
        if self._gather is not None:
            self._gather.restore_hooks()

    @contextmanager
    def hold_units(self, units: list[Unit]) -> Iterator[None]:
        """Hold some units on every rank inside the block. Collective."""
        self._parking.refuse("hold_units", {"lp_params"})
        if self._gather is None:
            yield
            return
        with self._gather.hold([unit for unit in units if unit.stage == 3]):
            yield

    @contextmanager
    def keep_units(self, units: list[Unit]) -> Iterator[None]:
        """Units that forwards inside the block gather are not freed between them."""
        if self._gather is None:
            yield
            return
        with self._gather.keep([unit for unit in units if unit.stage == 3]):
            yield

    def ensure_backward(self) -> None:
        """Note that a backward is under way; for whoever runs another one inside it."""
        self._watch.ensure_begun()

    def offload_states(
        self,
        include: Iterable[str] | None = None,
        device: str = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
        *,
        folder: str | None = None,
    ) -> None:
        """Park state that rests on the host or on disk, until `reload_states`. Collective.

        Its memory is free meanwhile; using it is an error. Between phases of a job, as when the
        trained model generates: `offload_states(["optim_states", "hp_params", "lp_grads"])` leaves
        the model itself usable.

        Args:
            include: of "optim_states", "hp_params" (master weights), "lp_params" (the model's own),
                "lp_grads" and "contiguous_grad_buffer" (one memory at stage 1); default: all.
            device: "cpu", or "nvme" for disk. A model on the CPU is in host memory already.
            pin_memory: whether host memory is page-locked.
            non_blocking: return while copies to the host are under way.
            folder: for "nvme"; default: that of `Offload`.

        Raises ShardError for unknown names, if something is parked already, and on all ranks if
        one has no room.
        """
        self.before_change()
        self._parking.park(
            include, device, pin_memory=pin_memory, non_blocking=non_blocking, folder=folder
        )

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` parked, bit for bit; nothing if nothing is. Collective.

        non_blocking: return while copies from the host are under way.
        """
        self._parking.bring_back(non_blocking=non_blocking)

    def settle_states(self) -> None:
        """Wait for whatever moves between the places of state."""
        self.take_back()
        self._reducer.settle()
        if self._gather is not None:
            self._gather.settle()
        for unit in self._trainable:
            unit.settle_gradient()
        self._homes.settle()

    def close(self) -> None:
        """Undo the sharding: the model is whole again, with no hook of ours. Collective."""
        self.reload_states()
        self._drop_unsettled()
        self._host_step.close(is_torn=self.torn is not None)
        if self._gather is not None:
            with self._gather.hold():
                pass
            for unit in self.units:
                if unit.stage == 3:
                    unit.start_gather().wait()
                    unit.show()
            self._gather.close()
        for unit in self.units:
            for param in unit.params:
                show_class(param)
        disown(self.units)
        self._reducer.close()
        self._watch.close()
        self._homes.close()

    def release(self) -> None:
        """End training and leave the parameters as they are: sharded ones stay sharded, at stage 3.

        No hook of ours remains on the model; master copies, states and gradients are freed.
        `GatheredParameters` goes on making parameters whole, in the dtype of the model, and
        `ds_zero.shard` takes them over. Not collective, unless state is parked on disk.
        """
        self._parking.bring_back(non_blocking=False)
        self._drop_unsettled()
        self._host_step.close(is_torn=True)  # nobody steps on from what is not published
        disown(self.units)
        self._reducer.close()
        self._watch.close()
        if self._gather is not None:
            self._gather.settle()
            self._gather.remove_hooks()
            Released(self.units, self._gather, self._homes)
        self._is_released = True
        self.torn = "release() ended training and freed the optimizer's state"
        self._inner.state.clear()
        for group in self._inner.param_groups:
            group["params"] = []
        for unit in self.units:
            unit.end_training()
        self._homes.end_training()
        if self._gather is None:
            self._homes.close()
