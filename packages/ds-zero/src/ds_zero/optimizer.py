"""The optimizer that a user sees: their own, stepping on this rank's share of a sharded model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_core import comm
from ds_core.backward import BackwardWatch
from ds_core.fused import prefer_fused
from ds_core.gradients import GradientReducer
from ds_core.optimizer_state import allocate_state_of
from ds_core.precision import Precision
from ds_core.seams import Transport, change_freely, tearing
from ds_zero import checks, inner_step, preflight
from ds_zero.agreement import Agreement, agree
from ds_zero.checks import OWNER
from ds_zero.early_updates import EarlyUpdates
from ds_zero.errors import ShardError
from ds_zero.gather import GatherRuntime
from ds_zero.held_values import HeldValues
from ds_zero.host_steps.speculative import Speculation
from ds_zero.host_steps.twin_flow import TwinFlow
from ds_zero.host_steps.worker import HostWorker
from ds_zero.host_steps.zenflow import ZenFlow, ZenFlowStep
from ds_zero.memory_plan import MemoryPlan
from ds_zero.offload import Offload
from ds_zero.offload.choice import is_host
from ds_zero.offload.homes import Homes
from ds_zero.parking import KINDS, Parking
from ds_zero.plan import Selector, UnitSpec, plan_units
from ds_zero.publishing import Publishing
from ds_zero.released import Released
from ds_zero.sharded_param import show_class
from ds_zero.unit import Unit
from ds_zero.unit_plan import Setup
from ds_zero.whole_matrices import matrix_steps
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
        *,
        stage: int,
        mesh: comm.Mesh,
        units: Iterable[Selector] | None,
        leaves: Iterable[Selector],
        min_unit_numel: int,
        precision: Precision,
        max_grad_norm: float | None,
        prefetch: int,
        broadcast: bool,
        transport: Transport,
        offload: Offload,
        update_in_backward: bool,
        check_memory: bool,
        zenflow: ZenFlow | None,
        accumulation: int = 1,
        scales_gradients: bool = False,
    ) -> None:
        specs = checks.parameters_of(model, optimizer, mesh.group("dp"))
        self._inner = optimizer
        self.__setstate__({"defaults": optimizer.defaults})
        self.stage, self.mesh, self.max_grad_norm = stage, mesh, max_grad_norm
        plan = plan_units(model, specs, units=units, leaves=leaves, min_unit_numel=min_unit_numel)
        lanes = {axes: _reduce_lane(mesh.group(*axes), stage) for axes in _axes_of(plan)}
        device = specs[0].param.device
        #: What this rank was found to need, if that was checked.
        self.memory_plan: MemoryPlan | None = None
        if check_memory:
            setup = Setup(
                stage,
                lambda spec: _member(mesh.group(*spec.placement.grad_axes)),
                precision,
                preflight.state_bytes_of(optimizer, device),
                offload,
                update_in_backward,
                accumulation=accumulation,
                zenflow=zenflow,
                prefetch=prefetch,
                is_host=is_host(device),
            )
            clips, group = scales_gradients or max_grad_norm is not None, mesh.group("dp")
            self.memory_plan = preflight.check_memory(
                plan, setup, group, device=device, clips=clips
            )
        self._homes = Homes(offload, device, dist.get_rank())
        self._before_change = _BeforeChange()
        if self.memory_plan is not None:
            self._homes.tell_speed(self.memory_plan.files, self.memory_plan.room)
        self.updates_in_backward = update_in_backward
        tiers = offload.states_of([_trained_numel(spec) for spec in plan])
        self.units: list[Unit] = []
        kept: dict[torch.Tensor, Any] = {}
        for index, spec in enumerate(plan):
            unit = Unit(
                index,
                spec,
                mesh.group(*spec.placement.grad_axes),
                stage=stage,
                precision=precision,
                values=checks.full_value,
                broadcast=broadcast,
                transport=transport,
                reduce_group=lanes[spec.placement.grad_axes],
                homes=self._homes,
                states=tiers[index],
                consumed=update_in_backward,
            )
            self.units.append(unit)
            # One unit after the other: only one is whole, and in memory if it lives on disk.
            kept.update(self._put_on_disk(unit))
            if unit.stage == 3:
                unit.free(_NOBODY)
        self._trainable = [unit for unit in self.units if unit.trainable]
        self._hand_over_to_inner(kept)
        self._matrices = matrix_steps(self._inner, self._trainable)
        self._parking = Parking(self, model)
        self._watch = BackwardWatch(model, self._begin_backward, self._end_backward)
        self._gather: GatherRuntime | None = None
        sharded = [unit for unit in self.units if unit.stage == 3]
        if sharded:
            self._gather = GatherRuntime(
                model, sharded, self._watch.ensure_begun, prefetch=prefetch
            )
        self._reducer = GradientReducer(
            self._trainable,
            self._watch.ensure_begun,
            self._gradients_complete,
            gathers_meanwhile=self._gather is not None,
        )
        # Stages 2 and 3 reduce each micro-batch, so as not to hold full-size gradients; so does
        # stage 1 if gradients accumulate in a wider dtype than they have.
        self.reduces_each_backward = stage >= 2 or any(
            unit.grad_dtype != unit.dtype for unit in self._trainable
        )
        self._pending_scale: float | torch.Tensor = 1.0
        self._agreed: Agreement | None = None
        #: What a backward has updated already, of an optimizer that updates in backward.
        self._early: EarlyUpdates | None = None
        if update_in_backward:
            self._early = EarlyUpdates(
                self._inner, self._trainable, self._matrices, self._homes, self._before_change
            )
            self.reduces_each_backward = False
        self._worker: HostWorker | None = None
        #: Steps that are taken before they are asked for, of an optimizer that speculates.
        self._ahead: Speculation | None = None
        #: What steps on the host and on the device at the same time, if both have states.
        self._twins: TwinFlow | None = None
        #: What updates the important part at once and the rest now and then.
        self._zenflow: ZenFlowStep | None = None
        if zenflow is not None:
            self._worker = HostWorker(beside=zenflow.overlap_step)
            self._zenflow = ZenFlowStep(self._inner, self._trainable, zenflow, self._worker)
        if offload.speculative or offload.splits:
            beside = self._homes.leaves_device or offload.splits
            self._worker = HostWorker(beside=beside and offload.parameters != "nvme")
        if self._worker is not None and offload.splits:
            ranks = mesh.group("dp")
            self._twins = TwinFlow(self._inner, self._trainable, offload, ranks, self._worker)
        if self._worker is not None and offload.speculative:
            self._ahead = Speculation(
                self._inner, self._trainable, self._worker, self._before_change
            )
        sources = [self._homes, self._early, self._ahead]
        self._wholeness = Wholeness([each for each in sources if each is not None], device)
        self._is_loading = self._is_released = False

    @property
    def before_change(self) -> Callable[[], None]:
        """Called before parameters or states change; set it to wait for who still reads them."""
        return self._before_change.call

    @before_change.setter
    def before_change(self, call: Callable[[], None]) -> None:
        self._before_change.call = call

    @property
    def torn(self) -> str | None:
        """Why what this rank holds does not belong to one step, after an error; None if it does.

        Steps, saves and `publish` are refused then, on all ranks, until a checkpoint is loaded:
        `prepare_load`, then `load_state_dict`.
        """
        return self._wholeness.reason

    @torn.setter
    def torn(self, reason: str | None) -> None:
        self._wholeness.reason = reason

    def _put_on_disk(self, unit: Unit) -> dict[torch.Tensor, dict[str, Any]]:
        """Allocate the states of a unit that lives on disk, and write them; their small parts."""
        if unit.states != "nvme":
            return {}
        initial = inner_step.initial_state(self._inner, [unit])
        kept: dict[torch.Tensor, dict[str, Any]] = {}
        for piece in unit.optimizer_pieces:
            if piece.weights in initial:
                self._inner.state[piece.weights] = initial[piece.weights]
            else:
                group = self._inner.param_groups[piece.group_index]
                checks.check_first_step(self._inner, group)
                with unit.present(piece, edits=False):
                    allocate_state_of(self._inner, group, piece.weights)
            unit.put_on_disk(piece, self._inner)
            kept[piece.weights] = self._inner.state[piece.weights]
        unit.drop_master()
        return kept

    def _hand_over_to_inner(self, kept: dict[torch.Tensor, dict[str, Any]]) -> None:
        """Make the inner optimizer's groups hold flat shards in place of the model's parameters.

        kept: the state of shards that have one already.
        """
        pieces: list[list[nn.Parameter]] = [[] for _ in self._inner.param_groups]
        for unit in self._trainable:
            for piece in unit.optimizer_pieces:
                pieces[piece.group_index].append(piece.weights)
        others = [unit for unit in self._trainable if unit.states != "nvme"]
        initial = inner_step.initial_state(self._inner, others)
        for group, params in zip(self._inner.param_groups, pieces, strict=True):
            group["params"] = params
        self._inner.state.clear()
        self._inner.state.update({**initial, **kept})
        inner_step.number_pieces(self._inner, self._trainable)
        prefer_fused(self._inner)

    # torch's schedulers and scalers read and write these two.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups: hyperparameters, and this rank's flat shards."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state of this rank's flat shards."""
        self.take_back()
        return self._inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self._inner.state = value

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

        None: more backwards follow before the step. Tells only an optimizer that speculates.
        """
        return 1.0 if self._ahead is None else self._ahead.expected_scale

    @expected_scale.setter
    def expected_scale(self, value: float | None) -> None:
        if self._ahead is not None:
            self._ahead.expected_scale = value

    def take_back(self) -> None:
        """Weights and states are in their places, as the last `step` left them.

        What was stepped ahead is taken back, what was begun is waited for.
        """
        if self._ahead is not None:
            self._ahead.take_back()
        if self._zenflow is not None:
            with tearing(self, "a step of what ZenFlow leaves for later"):
                self._zenflow.settle()

    def _settle_whole(self, operation: str) -> None:
        """As `take_back`, and all is on disk that is to be there. Collective.

        Raises ShardError on every rank if that failed on one, or a step was torn before.
        """
        if self._is_loading:
            return
        cause: Exception | None = None
        try:
            self.take_back()
            self._homes.settle()
        except Exception as error:
            cause = error
        self._wholeness.check(operation, self.mesh.group("dp"), cause)

    def _drop_unsettled(self) -> None:
        """As `take_back`; of what is torn, errors do not matter any more."""
        if self.torn is None:
            self.take_back()
            return
        if self._ahead is not None:
            self._ahead.drop()
        if self._zenflow is not None:
            self._zenflow.drop()

    def _begin_backward(self) -> None:
        needs = {"lp_params", *_GRADIENTS} if self._early is None else KINDS
        self._parking.refuse("backward", needs)
        self._agreed = None
        if self._early is not None:
            self._early.begin_backward()
        if self._ahead is not None:
            self._ahead.begin_backward()
        self._reducer.begin()
        if self._gather is not None:
            self._gather.begin_backward()

    def _end_backward(self) -> None:
        if self._gather is not None:
            self._gather.end_backward()
        self._reducer.finish()
        if self._early is not None:
            self._early.end_backward()
        if self._ahead is not None:
            self._ahead.end_backward()

    def _gradients_complete(self, unit: Unit) -> None:
        if self._gather is not None and unit.stage == 3:
            self._gather.release(unit)

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
        if self._ahead is not None and not bool(torch.isfinite(norm)):
            self._ahead.take_back()
        return norm

    def _agree(self, *, with_norm: bool) -> Agreement:
        """What all ranks know of the gradients; asked once. Raises what made work ahead fail."""
        if self._is_released:
            raise ShardError("release() has ended training: shard the model anew to go on")
        if self._agreed is not None and not (with_norm and self._agreed.norm is None):
            return self._agreed
        squares: Mapping[int, torch.Tensor] = {}
        updated: torch.Tensor | None = None
        failure: BaseException | None = None
        if self._early is not None:
            squares, updated = self._early.norm_squares, self._early.updated
            failure = self._early.failure
        elif self._ahead is not None:
            squares, failure = self._ahead.norm_squares(), self._ahead.error
        trouble = self._wholeness.trouble
        if trouble is None and failure is not None:
            told = f"a step ahead failed, and was undone: {type(failure).__name__}: {failure}"
            trouble = Trouble(told, is_torn=False)
        try:
            self._agreed = agree(
                self._trainable,
                with_norm=with_norm,
                squares=squares,
                updated=updated,
                trouble=trouble,
            )
        except ShardError as error:
            if failure is not None:
                raise failure from error
            raise
        if self._early is not None and self._agreed.norm is not None:
            self._early.judge(self._agreed.norm, self._agreed.updated)
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
        agreed = self._agree(with_norm=self._early is not None)
        try:
            if self._early is not None:
                assert agreed.norm is not None
                self._early.finish(agreed.norm, grad_scale)
            else:
                with tearing(self, "the optimizer's step"):
                    self._update(agreed.used, grad_scale)
        except BaseException:
            self._agreed = None  # who steps again asks again
            raise

    def _update(self, used: dict[int, list[bool]], grad_scale: float | torch.Tensor) -> None:
        for matrices in self._matrices:
            matrices.run(used, grad_scale)
        step = inner_step.InnerStep(self._inner, grad_scale)
        self._homes.expect(
            piece.weights for unit in self._trainable for piece in step.due(unit, used[unit.index])
        )
        if self._twins is not None:
            self._twins.run(used, grad_scale, self._ahead)
            return
        publishing = Publishing()
        for unit in self._trainable:
            publishing.attempt(partial(self._step_unit, unit, used[unit.index], grad_scale, step))
            publishing.publish(unit)
        publishing.finish()

    def _step_unit(
        self,
        unit: Unit,
        used: list[bool],
        grad_scale: float | torch.Tensor,
        step: inner_step.InnerStep,
    ) -> None:
        if self._zenflow is not None:
            self._zenflow.run(unit, used, grad_scale, step)
        elif self._ahead is None or not self._ahead.settle(unit, used, grad_scale):
            step.run(unit, used)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients. Their persistent buffers stay; nothing is written."""
        self._parking.refuse("zero_grad", _GRADIENTS)
        self._agreed = None
        if self._early is not None:
            self._early.forget()
        if self._ahead is not None:
            (self._ahead.take_back if self.torn is None else self._ahead.drop)()
        self._reducer.forget()
        for unit in self._trainable:
            unit.clear_gradient()
        if self._twins is not None:
            self._twins.move()

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

    def settle(self) -> None:
        """Wait until what was written to disk is there; it goes on beside the program otherwise.

        Raises the error of a write that failed.
        """
        self._homes.settle()

    def swap_bytes(self) -> tuple[int, int]:
        """Bytes that this rank has read from and written to disk so far."""
        return self._homes.swap_bytes()

    def close(self) -> None:
        """Undo the sharding: the model is whole again, with no hook of ours. Collective."""
        self.reload_states()
        self._drop_unsettled()
        if self._zenflow is not None and self.torn is None:
            self._publish()  # the model sees all that is done
        if self._worker is not None:
            self._worker.close()
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
                param.__dict__.pop(OWNER, None)
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
        if self._worker is not None:
            self._worker.close()
        for unit in self.units:
            for param in unit.params:
                param.__dict__.pop(OWNER, None)
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


def _axes_of(plan: list[UnitSpec]) -> list[tuple[str, ...]]:
    """Every tuple of axes over which some unit's gradients are averaged, in order of first use."""
    return list(dict.fromkeys(spec.placement.grad_axes for spec in plan))


def _reduce_lane(group: comm.Group, stage: int) -> comm.Group:
    """Where gradients travel: at stage 3 in an order of their own, since gathers come between."""
    return group.lane("gradients") if stage == 3 else group


def owners_of(params: Iterable[nn.Parameter]) -> dict[int, tuple[ZeroOptimizer, list[Unit]]]:
    """The sharding optimizers behind `params`, each with the units concerned, in unit order."""
    found: dict[int, tuple[ZeroOptimizer, list[Unit]]] = {}
    for param in params:
        reference = getattr(param, OWNER, None)
        owner = None if reference is None else reference()
        if owner is None:
            continue
        unit = owner.units[param._ds_zero_unit]  # type: ignore[attr-defined]
        units = found.setdefault(id(owner), (owner, []))[1]
        if unit not in units:
            units.append(unit)
    for _, units in found.values():
        units.sort(key=lambda unit: unit.index)
    return found


def _member(group: comm.Group) -> tuple[int, int]:
    """Size of a group, and which of its ranks this is."""
    return group.size, group.rank


def _trained_numel(spec: UnitSpec) -> int:
    """Elements of a unit that an optimizer updates; all of them or none."""
    return sum(each.param.numel() for each in spec.params) if spec.trainable else 0


class _BeforeChange:
    """Whom to call before parameters or states change; several parts share one."""

    def __init__(self) -> None:
        self.call: Callable[[], None] = change_freely

    def __call__(self) -> None:
        self.call()


class _Nobody:
    """Keeps a sharded parameter while the optimizer is being built."""

    detaches_later = values_stay = False

    def touch(self, params: list[nn.Parameter], operation: str) -> None:
        """See `sharded_param.Keeper`."""
        raise ShardError(f"{operation} needs a parameter of a model that is being sharded")


_NOBODY = _Nobody()
