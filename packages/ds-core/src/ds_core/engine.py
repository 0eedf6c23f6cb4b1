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

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ds_core import comm
from ds_core.backward import map_differentiable
from ds_core.buffers import persistent_buffers
from ds_core.errors import DsError, NonFiniteError
from ds_core.precision import LossScaler, Precision
from ds_core.seams import (
    Event,
    EventKind,
    InputAdjuster,
    Observer,
    Runner,
    Sequential,
    Sharding,
)


class Engine(nn.Module):
    """A model in training; made by `ds_core.initialize`.

    Attributes:
        module: the model itself.
        sharding: who holds and updates its parameters.
        lr_scheduler: stepped after each optimizer step that was not skipped, or None.
        accumulation: micro-batches per optimizer step.
        micro_batch_size: samples per micro-batch and rank.
        global_step: optimizer steps taken, skipped ones included.
        grad_norm: global L2 norm of the last step's gradients before clipping, or None.
        dataloader: yields this rank's micro-batches of `training_data`, or None.

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
        micro_batch_size: int = 1,
        max_grad_norm: float = 0.0,
        lr_scheduler: Any = None,
        runner: Runner | None = None,
        observers: Iterable[Observer] = (),
        dataloader: Any = None,
        device: torch.device | None = None,
        decisions: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.sharding, self.mesh, self.precision = sharding, mesh, precision
        self.lr_scheduler, self.dataloader = lr_scheduler, dataloader
        self.accumulation, self.micro_batch_size = accumulation, micro_batch_size
        self.max_grad_norm = max_grad_norm
        self.scaler = LossScaler(precision.loss_scale)
        self.device = device or next(module.parameters()).device
        self.global_step = self.skipped_steps = 0
        self.grad_norm: float | None = None
        self._micro_step = 0
        self._losses: list[torch.Tensor] = []
        self._scaled_by_loss = False
        self._no_sync = False
        self._batches: Iterator[Any] | None = None
        self._runner = runner or Sequential()
        self._observers = list(observers)
        self._adjusters = [each for each in self._observers if isinstance(each, InputAdjuster)]
        self._emit(EventKind.START, **(decisions or {}))

    # ------------------------------------------------------------------ a micro-batch

    @property
    def is_boundary(self) -> bool:
        """Whether the present micro-batch is the last of its optimizer step."""
        return self._micro_step == self.accumulation - 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; its outputs remember the loss scale, for a plain `loss.backward()`."""
        trains = self.training and torch.is_grad_enabled()
        if trains and self._micro_step == 0:
            self._emit(EventKind.STEP_BEGIN)
        if trains:
            for adjuster in self._adjusters:
                args, kwargs = adjuster.adjust_inputs(self, args, kwargs)
        with self._autocast():
            output = self.module(*args, **kwargs)
        if torch.is_grad_enabled():
            self._prepare_backward()
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

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision.autocast)

    def _prepare_backward(self) -> None:
        """Gradients that are not sharded are averaged once per step, at its last micro-batch."""
        early = not self.is_boundary and not self.sharding.reduces_each_backward
        self.sharding.accumulate_locally = self._no_sync or early

    def _scaled(self, output: torch.Tensor) -> torch.Tensor:
        """The same values, whose gradient is scaled on its way back.

        A view, because one output may be computed from another (a loss from logits): a hook on
        the logits themselves would scale what comes back through the loss a second time.
        """
        if self.scaler.scale == self.accumulation:
            return output
        view = output.view_as(output)
        view.register_hook(self._scale_gradient)
        return view

    def _scale_gradient(self, gradient: torch.Tensor) -> torch.Tensor | None:
        if self._scaled_by_loss:
            return None
        factor = self.scaler.scale / self.accumulation
        return None if factor == 1.0 else gradient * factor

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch's loss, scaled as precision and accumulation ask for.

        `loss.backward()` does the same for a loss that depends on the model's outputs only; under
        fp16 this is the safer of the two, because the loss itself is scaled before its gradient
        can underflow.
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
        self._losses.append(loss.detach())
        factor = self.scaler.scale / self.accumulation
        self._scaled_by_loss = True
        try:
            (loss if factor == 1.0 else loss * factor).backward()
        finally:
            self._scaled_by_loss = False
        self._emit(EventKind.BACKWARD)

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside accumulate locally, at every stage; the next one outside reduces."""
        return _NoSync(self)

    # ------------------------------------------------------------------ a step

    def step(self) -> bool:
        """Count one micro-batch; after the last of a step, clip and update the parameters.

        Returns whether parameters were updated. With a loss scale, a step whose gradients
        overflow on any rank is skipped on all. Raises NonFiniteError if gradients are not finite
        without one: the parameters are left as they were.
        """
        self._micro_step += 1
        if self._micro_step < self.accumulation:
            return False
        self._micro_step = 0
        norm = float(self.sharding.grad_norm()) / self.scaler.scale
        self.grad_norm = norm
        self._emit(EventKind.REDUCED, grad_norm=norm)
        overflowed = norm != norm or norm == float("inf")
        if overflowed and not self.scaler.may_skip:
            self._raise_nonfinite(norm)
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
        rates = [float(group["lr"]) for group in self.sharding.param_groups]
        if self.lr_scheduler is not None and not overflowed:
            self.lr_scheduler.step()
        self._emit(
            EventKind.STEP_END,
            loss=self._mean_loss(),
            lr=rates[0] if rates else None,
            grad_norm=norm,
            loss_scale=scale if self.scaler.may_skip else None,
            skipped=overflowed,
        )
        return not overflowed

    def train_batch(self, batches: Iterator[Any] | None = None) -> torch.Tensor:
        """One whole optimizer step from an iterator of micro-batches; returns the mean loss.

        Without an iterator, goes on with the engine's own `dataloader`, epoch after epoch.
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
        return self._runner.run(self, batches)

    def _mean_loss(self) -> torch.Tensor | None:
        """Mean loss of the step's micro-batches on this rank; not synchronized with the device."""
        losses, self._losses = self._losses, []
        return torch.stack([loss.float() for loss in losses]).mean() if losses else None

    def _raise_nonfinite(self, norm: float) -> None:
        loss = self._mean_loss()
        # After a plain `loss.backward()` nobody has told the engine the loss.
        told = "loss not known" if loss is None else f"loss {float(loss):g}"
        mine = (told, self.sharding.first_nonfinite())
        everybody = comm.all_gather_object(mine, self.mesh.group("dp"), caller="non-finite check")
        self.sharding.zero_grad()
        found = "; ".join(
            f"rank {rank}: {its_loss}" + (f", first gradient {name!r}" if name else "")
            for rank, (its_loss, name) in enumerate(everybody)
        )
        raise NonFiniteError(
            f"step {self.global_step}: the gradient norm is {norm}, so the step was not taken "
            f"({found}); lower the learning rate, look at the data of this step, or use fp16 with "
            f"its loss scale if steps may be skipped"
        )

    # ------------------------------------------------------------------ state

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

        load_model(self, state_dict, strict=strict)

    def buffer_state(self) -> dict[str, torch.Tensor]:
        """Persistent buffers by name."""
        parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        with torch.no_grad():
            return {
                name: tensor.detach().clone()
                for name, tensor in persistent_buffers(self.module)
                if name not in parameters
            }

    def save_checkpoint(
        self,
        directory: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
    ) -> str:
        """Save everything needed to go on, at any stage and world size; returns the path.

        Args:
            directory: shared by all ranks.
            tag: name of this checkpoint; default: "step" and the step's number.
            client_state: the caller's own JSON-able values; `load_checkpoint` returns them.

        Atomic: until it is complete, the previous checkpoint stays the one that loads. Collective.
        """
        from ds_core.engine_state import save

        path = save(self, directory, tag, client_state)
        self._emit(EventKind.CHECKPOINT, path=path, action="saved")
        return path

    def load_checkpoint(
        self, directory: str | os.PathLike[str], tag: str | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint of any stage and world size; returns its `client_state`.

        tag: which one; default: the latest. Raises CheckpointError if it is missing, damaged, or
        of another model; the engine must not be used then. Collective.
        """
        from ds_core.engine_state import load

        path, client_state = load(self, directory, tag)
        self._emit(EventKind.CHECKPOINT, path=path, action="loaded")
        return client_state

    def memory(self) -> dict[str, int]:
        """Bytes of model state that this rank holds between steps, by kind."""
        return self.sharding.memory()

    def close(self) -> None:
        """Give the model back whole and without hooks, and let the observers finish."""
        self._emit(EventKind.CLOSE)
        self._observers.clear()
        self._adjusters.clear()
        self.sharding.close()

    def _emit(self, kind: EventKind, **values: Any) -> None:
        event = Event(kind, self.global_step, values)
        for observer in self._observers:
            observer.on_event(self, event)


class _NoSync(AbstractContextManager[None]):
    def __init__(self, engine: Engine) -> None:
        self._engine, self._before = engine, False

    def __enter__(self) -> None:
        self._before, self._engine._no_sync = self._engine._no_sync, True

    def __exit__(self, *error: object) -> None:
        self._engine._no_sync = self._before


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
