"""The engine: precision, accumulation and clipping around a model, composed from the seams.

    engine = ds_core.initialize(model, config)
    for batch in loader:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()

Which rank holds what is the sharding's business, how micro-batches flow the runner's, and whoever
wants to watch or adjust is an observer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_core import comm
from ds_core.accumulation import Accumulation, Held
from ds_core.backward import differentiable_tensors, map_differentiable
from ds_core.engine_files import EngineFiles, ReadsInFlight, SavePolicy, told_of_torn
from ds_core.errors import CommError, DsError, NonFiniteError
from ds_core.precision import LossScaler, Precision
from ds_core.seams import (
    Event,
    EventKind,
    InputAdjuster,
    Observer,
    ParkableSharding,
    ReleasableSharding,
    Runner,
    Sequential,
    Sharding,
)

if TYPE_CHECKING:
    from ds_core.compiled_blocks import CompiledBlocks


class Engine(EngineFiles):
    """A model in training; made by `ds_core.initialize`.

    Attributes:
        module: the model itself.
        sharding: who holds and updates its parameters.
        lr_scheduler: stepped after each optimizer step that was not skipped, or None.
        was_step_applied: whether the last `step` updated the parameters.
        micro_batch_size: samples per micro-batch and rank.
        global_step: optimizer steps taken, skipped ones included.
        grad_norm: global L2 norm of the last step's gradients before clipping, or None.
        dataloader: yields this rank's micro-batches of `training_data`, or None.
        skips_nonfinite: whether a step whose gradients are not finite is left out, as it is with a
            loss scale, rather than an error. May be set between steps.

    Every method that runs the model or touches parameters is collective.
    """

    def __init__(
        self,
        module: nn.Module,
        sharding: Sharding,
        *,
        mesh: comm.Mesh,
        precision: Precision,
        accumulation: int = 1,
        managed_accumulation: bool = True,
        micro_batch_size: int = 1,
        max_grad_norm: float = 0.0,
        loss_weight: float = 1.0,
        lr_scheduler: Any = None,
        runner: Runner | None = None,
        observers: Iterable[Observer] = (),
        dataloader: Any = None,
        device: torch.device | None = None,
        decisions: Mapping[str, Any] | None = None,
        saving: SavePolicy | None = None,
        frozen: Iterable[nn.Parameter] = (),
        trains: bool = True,
    ) -> None:
        super().__init__()
        self.module = module
        self.sharding, self.mesh, self.precision = sharding, mesh, precision
        self.lr_scheduler, self.dataloader = lr_scheduler, dataloader
        self.micro_batch_size = micro_batch_size
        self.max_grad_norm, self._loss_weight = max_grad_norm, loss_weight
        self.scaler = LossScaler(precision.loss_scale)
        self.device = device or next(module.parameters()).device
        self.global_step = self.skipped_steps = 0
        self.skips_nonfinite = False
        self._trains, self._frozen = trains, tuple(frozen)
        self.grad_norm: float | None = None
        self.was_step_applied = False
        self._micro = Accumulation(accumulation, managed=managed_accumulation)
        self._run_module = precision.applied_to(module.__call__, self.device.type)
        self._losses: list[torch.Tensor] = []
        self._scaled_by_loss = False
        self._saving, self._reads = saving or SavePolicy(), ReadsInFlight()
        sharding.before_change = self._reads
        self._compiled: CompiledBlocks | None = None
        self._batches: Iterator[Any] | None = None
        self._runner = runner or Sequential()
        self._observers = list(observers)
        self._adjusters = [each for each in self._observers if isinstance(each, InputAdjuster)]
        self._emit(EventKind.START, **(decisions or {}))

    def __setattr__(self, name: str, value: Any) -> None:
        # What nn.Module does for every assignment costs more than the rest of a small step.
        if isinstance(value, nn.Module):
            super().__setattr__(name, value)
        else:
            object.__setattr__(self, name, value)

    # ------------------------------------------------------------------ a micro-batch

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self._micro.steps

    @property
    def is_boundary(self) -> bool:
        """Whether the present micro-batch is the last of its optimizer step.

        Without managed accumulation this is known only once `step` is called.
        """
        return self._micro.is_boundary

    def set_boundary(self, is_boundary: bool | None) -> None:
        """Say whether the present micro-batch ends its step, until told otherwise; None: count.

        Set it before the forward. Each loss is divided by `accumulation` all the same.
        """
        self._micro.say(is_boundary)

    def set_train_batch_size(self, samples: int) -> None:
        """Make a step as many micro-batches as give `samples` over all ranks.

        Raises DsError in the middle of a step, or if micro-batches do not divide `samples`.
        """
        per_micro_batch = self.micro_batch_size * self.mesh.size("dp")
        self._micro.resize("set_train_batch_size", samples, per_micro_batch)

    def set_train_micro_batch_size(self, samples: int) -> None:
        """State how many samples a micro-batch of one rank has from now on.

        For whoever makes the batches: accumulation stays, so the batch of a step changes with it.
        Raises DsError in the middle of a step, or if the engine's own `dataloader` makes them.
        """
        self._micro.check_between_steps("set_train_micro_batch_size")
        if samples <= 0 or self.dataloader is not None:
            raise DsError(
                f"set_train_micro_batch_size: got {samples}"
                + (
                    ", expected at least 1"
                    if samples <= 0
                    else "; training_data is cut into fixed "
                    "micro-batches: give batches of your own to train_batch(iterator) instead"
                )
            )
        self.micro_batch_size = samples

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; its outputs remember the loss scale, for a plain `loss.backward()`."""
        trains = self.training and torch.is_grad_enabled()
        if trains:
            if self._micro.begin():
                self._emit(EventKind.STEP_BEGIN)
            self._emit(EventKind.FORWARD_BEGIN)
            for adjuster in self._adjusters:
                args, kwargs = adjuster.adjust_inputs(self, args, kwargs)
        output = self._run_module(*args, **kwargs)
        if torch.is_grad_enabled():
            self._prepare_backward()
            if trains and self._observers:
                self._announce_backward(output)
            output = map_differentiable(output, self._scaled)
        if trains:
            self._emit(EventKind.FORWARD)
        return output

    def run_batch(self, batch: Any) -> Any:
        """Run the model on one batch of a loader, moved to the engine's device.

        A mapping becomes keyword arguments, a tuple or list positional ones, anything else the
        only argument.
        """
        batch = _to_device(batch, self.device)
        if isinstance(batch, Mapping):
            return self(**batch)
        if isinstance(batch, list | tuple):
            return self(*batch)
        return self(batch)

    def _prepare_backward(self) -> None:
        """Gradients that are not sharded are averaged once per step, at its last micro-batch."""
        if self.sharding.updates_in_backward:
            self._refuse_torn("backward")
        early = not self._micro.is_boundary and not self.sharding.reduces_each_backward
        self.sharding.accumulate_locally = self._micro.held or early
        is_last = self._micro.is_boundary and not self._micro.held
        self.sharding.expected_scale = 1.0 / self.scaler.scale if is_last else None

    def _scaled(self, output: torch.Tensor) -> torch.Tensor:
        """The same values, whose gradient is scaled on its way back.

        A view, because one output may be computed from another (a loss from logits): a hook on
        the logits themselves would scale what comes back through the loss a second time.
        """
        if self._loss_factor() == 1.0:
            if output.grad_fn is not None:  # else it is no result, and its hooks would add up
                output.register_hook(self._note_backward)
            return output
        view = output.view_as(output)
        view.register_hook(self._scale_gradient)
        return view

    def _note_backward(self, _: torch.Tensor | None = None) -> None:
        """A backward that may be a plain `loss.backward()` has begun."""
        updates = self.sharding.updates_in_backward and not self.sharding.accumulate_locally
        self._micro.note_backward(took_step=updates)

    def _scale_gradient(self, gradient: torch.Tensor) -> torch.Tensor | None:
        self._note_backward()
        if self._scaled_by_loss:
            return None
        return gradient * self._loss_factor()

    def _loss_factor(self, *, divides: bool = True) -> float:
        factor = self.scaler.scale * self._loss_weight
        return factor / self._micro.steps if divides else factor

    def backward(
        self,
        loss: torch.Tensor,
        *,
        retain_graph: bool = False,
        divides_by_accumulation: bool = True,
    ) -> None:
        """Backward of one micro-batch's loss, scaled as precision and accumulation ask for.

        `loss.backward()` does the same for a loss that depends on the model's outputs only; under
        fp16 this is the safer of the two, because the loss itself is scaled before its gradient
        can underflow.

        Args:
            loss: a scalar.
            retain_graph: keep what autograd has saved, for another backward through it.
            divides_by_accumulation: if False, the caller has divided the loss by the number of
                micro-batches of the step already, or weighs them otherwise.
        """
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise DsError(
                f"backward: expected a scalar loss, got {_describe(loss)}; reduce it with .mean()"
            )
        if not loss.requires_grad:
            raise DsError(
                "backward: the loss does not depend on a parameter that is trained; it was "
                "computed under no_grad, or detached"
            )
        self._prepare_backward()
        self._note_backward()
        self._emit(EventKind.BACKWARD_BEGIN)
        factor = self._loss_factor(divides=divides_by_accumulation)
        self._scaled_by_loss = True
        try:
            (loss if factor == 1.0 else loss * factor).backward(retain_graph=retain_graph)
        finally:
            self._scaled_by_loss = False
        self._losses.append(loss.detach())
        self._emit(EventKind.BACKWARD)

    def _announce_backward(self, output: Any) -> None:
        """A plain `loss.backward()` is an event too: it begins here and ends with autograd.

        On the model's own outputs, not on our views of them: the sharding's hooks on these were
        there first, so it has finished its averages when BACKWARD is emitted.
        """
        begun = False

        def end() -> None:
            nonlocal begun
            begun = False
            self._emit(EventKind.BACKWARD)

        def begin(_: torch.Tensor) -> None:
            nonlocal begun
            if begun or self._scaled_by_loss:
                return  # `backward` tells it
            begun = True
            autograd: Any = torch.autograd.Variable._execution_engine
            autograd.queue_callback(end)
            self._emit(EventKind.BACKWARD_BEGIN)

        for tensor in differentiable_tensors(output):
            tensor.register_hook(begin)

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside accumulate locally, at every stage; the next one outside reduces."""
        return Held(self._micro, release=_nothing)

    def reduce_once(self) -> AbstractContextManager[None]:
        """Several backwards inside are averaged over ranks once, together, at the end.

        For several losses of one micro-batch. At stages 2 and 3 full-size gradients exist
        meanwhile. Inside `no_sync`, and before a boundary below stage 2, the average waits on.
        """
        return Held(self._micro, release=self._release_gradients)

    def _release_gradients(self) -> None:
        self._prepare_backward()
        if not self.sharding.accumulate_locally:
            self._note_backward()
            self.sharding.reduce_local()

    # ------------------------------------------------------------------ a step

    def step(self) -> bool:
        """Count one micro-batch; after the last of a step, clip and update the parameters.

        Returns whether parameters were updated. With a loss scale, or if `skips_nonfinite`, a step
        whose gradients overflow on any rank is skipped on all. Else raises NonFiniteError if
        gradients are not finite: the parameters are left as they were, but for those that backward
        has updated already (update_in_backward), which the error tells of.

        An error in the middle of an update leaves parameters and state of different steps: further
        steps and saves then raise TornError, until a checkpoint is loaded.
        """
        if not self._trains:
            raise DsError(
                "step: this engine was made with training=False and has no optimizer; make one "
                "that trains"
            )
        self.was_step_applied = False
        if not self._micro.advance():
            return False
        self._emit(EventKind.UPDATE_BEGIN)
        norm = float(self.sharding.grad_norm()) / self.scaler.scale
        self.grad_norm = norm
        self._emit(EventKind.REDUCED, grad_norm=norm)
        overflowed = not math.isfinite(norm)
        if overflowed and not (self.scaler.may_skip or self.skips_nonfinite):
            self._raise_nonfinite(norm)
        self._refuse_torn("step")
        if not overflowed:
            clip = 1.0
            if self.max_grad_norm > 0:
                clip = min(1.0, self.max_grad_norm / (norm + 1e-6))
            self.sharding.update(clip / self.scaler.scale)
        self.sharding.zero_grad()
        scale = self.scaler.scale
        self.scaler.update(overflowed)
        self.global_step += 1
        self.skipped_steps += overflowed
        self.was_step_applied = not overflowed
        figures = self._figures(scale) if self._observers else {}
        self._losses.clear()
        if self.lr_scheduler is not None and not overflowed:
            self.lr_scheduler.step()
        self._emit(EventKind.STEP_END, **figures)
        return not overflowed

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what backwards have added up so far; `step` does this by itself.

        At every stage alike, so leave it out of a loop that accumulates. Micro-batches that `step`
        has counted stay counted.
        """
        self.sharding.zero_grad()
        self._micro.forget_gradients()
        self._losses.clear()

    def _figures(self, scale: float) -> dict[str, Any]:
        """What STEP_END tells of a step that was computed with a loss scale."""
        groups = self.sharding.param_groups
        return {
            "loss": self._mean_loss(),
            "lr": float(groups[0]["lr"]) if groups else None,
            "grad_norm": self.grad_norm,
            "loss_scale": scale if self.scaler.may_skip else None,
            "skipped": not self.was_step_applied,
        }

    def train_batch(self, batches: Iterator[Any] | None = None) -> torch.Tensor:
        """One whole optimizer step from an iterator of micro-batches; returns the mean loss.

        Without an iterator, goes on with the engine's own `dataloader`, epoch after epoch. After an
        error in the middle (the data ended, memory ran out), the step counts as not begun, unless
        it had begun to change parameters: see `step`.
        """
        if batches is None:
            if self.dataloader is None:
                raise DsError(
                    "train_batch: no iterator was given, and initialize() had no training_data"
                )
            if self._batches is None:
                self._batches = self.dataloader.forever()
            batches = self._batches
        if not hasattr(batches, "__next__"):
            raise DsError(
                f"train_batch: got {type(batches).__name__}, expected an iterator, which remembers "
                f"how far it has come; make one with iter(...) before the loop"
            )
        try:
            with self._micro.counted():
                return self._runner.run(self, batches)
        except CommError:
            raise  # ranks are lost: nothing more can be done together
        except Exception:
            self._micro.restart()
            self.zero_grad()
            raise

    def _mean_loss(self) -> torch.Tensor | None:
        """Mean loss of the step's micro-batches on this rank; not synchronized with the device."""
        losses = [loss.float() for loss in self._losses]
        return torch.stack(losses).mean() if losses else None

    def _raise_nonfinite(self, norm: float) -> None:
        loss = self._mean_loss()
        self._losses.clear()
        # After a plain `loss.backward()` nobody has told the engine the loss.
        told = "loss not known" if loss is None else f"loss {float(loss):g}"
        mine = (told, self.sharding.first_nonfinite(), self.sharding.torn)
        everybody = comm.all_gather_object(mine, self.mesh.group("dp"), caller="non-finite check")
        self.sharding.zero_grad()
        found = "; ".join(
            f"rank {rank}: {its_loss}" + (f", first gradient {name!r}" if name else "")
            for rank, (its_loss, name, _) in enumerate(everybody)
        )
        begin = f"step {self.global_step}: the gradient norm is {norm}"
        advice = "lower the learning rate, look at the data of this step"
        torn = told_of_torn([reason for _, _, reason in everybody])
        if torn is not None:
            # A rank whose share was finite has taken a step that others have not.
            self.sharding.torn = self.sharding.torn or torn
            raise NonFiniteError(
                f"{begin} ({found}), and part of the step was taken before that was known: {torn}; "
                f"load a checkpoint with its optimizer state (engine.load_checkpoint); {advice}"
            )
        raise NonFiniteError(
            f"{begin}, so the step was not taken ({found}); {advice}, or use fp16 with its loss "
            f"scale if steps may be skipped"
        )

    # ------------------------------------------------------------------ beside the loop

    def compile(
        self,
        *,
        modules: Iterable[nn.Module] | None = None,
        backend: str | Callable[..., Any] = "inductor",
        **options: Any,
    ) -> None:
        """torch.compile the model's repeated blocks, or all of it if it has none; until `close`.

        Args:
            modules: which ones instead.
            backend: of torch.compile.
            options: its further arguments: mode, dynamic, fullgraph, options.

        Raises DsError if torch.compile refuses them, or if called twice.
        """
        from ds_core.compiled_blocks import CompiledBlocks

        if self.is_compiled:
            raise DsError("compile: the model is compiled already; close the engine to undo it")
        self._compiled = CompiledBlocks(self.module, modules, backend, options)

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._compiled is not None

    def memory(self) -> dict[str, int]:
        """Bytes of model state that this rank holds between steps, by kind."""
        return self.sharding.memory()

    def offload_states(
        self,
        include: Iterable[str] | None = None,
        device: str = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
        *,
        folder: str | None = None,
    ) -> None:
        """Park state that rests, until `reload_states`: see the sharding's method. Collective.

        Args:
            include: of "optim_states", "hp_params", "lp_params", "lp_grads" and
                "contiguous_grad_buffer"; default: all.
            device: "cpu" or "nvme".
            pin_memory: whether host memory is page-locked.
            non_blocking: return while copies are under way.
            folder: for "nvme".

        Raises DsError if the model is not sharded, or for names that are not known.
        """
        self._parkable("offload_states").offload_states(
            include, device, pin_memory, non_blocking, folder=folder
        )

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` parked, bit for bit. Collective."""
        self._parkable("reload_states").reload_states(non_blocking)

    def _parkable(self, operation: str) -> ParkableSharding:
        if not isinstance(self.sharding, ParkableSharding):
            raise DsError(
                f"{operation}: {type(self.sharding).__name__} parks nothing; set "
                f"zero_optimization.stage to 1, 2 or 3 (pip install ds-zero)"
            )
        return self.sharding

    def log(self, scalars: Mapping[str, float | torch.Tensor]) -> None:
        """Hand figures of your own to the observers: every sink of metrics writes rank 0's.

        scalars: by name, as dashboards shall show it, such as "Eval/loss". Not collective.
        """
        self._emit(EventKind.LOG, **scalars)

    def close(self, *, whole: bool = True) -> None:
        """Give the model back whole and without hooks, and let the observers finish.

        whole: if False, a sharding that can leaves the parameters where they are, as ds_zero at
        stage 3, and frees the rest: the model need not fit on a rank, and nothing is sent.

        Waits for a checkpoint that is being written; raises CheckpointError, after all else is
        done, if it failed.
        """
        if self._compiled is not None:
            self._compiled.close()
            self._compiled = None
        # A file that one rank cannot write must not keep the others waiting.
        with ExitStack() as steps:
            steps.callback(self._thaw)
            leaves = not whole and isinstance(self.sharding, ReleasableSharding)
            steps.callback(self.sharding.release if leaves else self.sharding.close)  # type: ignore[attr-defined]
            steps.callback(self._adjusters.clear)
            steps.callback(self._observers.clear)
            steps.callback(self._emit, EventKind.CLOSE)
            steps.callback(self._close_saver)

    def _thaw(self) -> None:
        """What was frozen for the life of an engine that does not train can be trained again."""
        for param in self._frozen:
            param.requires_grad_(True)

    def _emit(self, kind: EventKind, /, **values: Any) -> None:
        if not self._observers:
            return
        event = Event(kind, self.global_step, values)
        for observer in self._observers:
            observer.on_event(self, event)


def _nothing() -> None:
    """What was held back waits for the next backward or step."""


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_device(item, device) for item in value]
    return value


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return type(value).__name__
