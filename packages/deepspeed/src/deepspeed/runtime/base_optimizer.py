"""The optimizer that `initialize` returns: the engine's, under the names that DeepSpeed's has."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from deepspeed._errors import NotProvidedError
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.utils.tensor_fragment import safe_set_full_fp32_param
from ds_core.checkpoint import FlatShard
from ds_zero import ZeroOptimizer

if TYPE_CHECKING:
    from ds_core.engine import Engine

logger = logging.getLogger("DeepSpeed")


class DeepSpeedOptimizer:
    """The class of which every optimizer of an engine is one."""


class ZeROOptimizer(DeepSpeedOptimizer):
    """The class of which the optimizer of an engine is one from stage 1 on."""


class EngineOptimizer(DeepSpeedOptimizer, Optimizer):
    """The optimizer of an engine, whatever it shards; `step` is the engine's.

    Attributes:
        optimizer: the torch optimizer that does the arithmetic, before sharding changed its groups.
        parameter_offload: at stage 3, what gathers parameters (`DeepSpeedZeRoOffload`).

    It is a `torch.optim.Optimizer` too, so that torch's schedules take it.
    """

    def __init__(self, engine: Engine, optimizer: Optimizer | None, *, stage: int) -> None:
        self._engine, self.optimizer, self.zero_stage = engine, optimizer, stage
        defaults = {} if optimizer is None else optimizer.defaults
        self.__setstate__({"defaults": defaults})
        sharding = engine.sharding
        if stage == 3 and isinstance(sharding, ZeroOptimizer):
            self.parameter_offload = DeepSpeedZeRoOffload(engine.module, sharding)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups: hyperparameters, which may be changed, and what this rank holds."""
        return self._engine.sharding.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._engine.sharding.param_groups[:] = groups

    @property
    def state(self) -> Any:
        """The state of what this rank holds, by tensor of `param_groups`."""
        sharding: Any = self._engine.sharding
        return sharding.state if isinstance(sharding, Optimizer) else sharding.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        raise NotProvidedError("optimizer.state cannot be replaced; use load_state_dict")

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped because gradients were not finite."""
        norm = self._engine.grad_norm
        return norm is not None and not torch.isfinite(torch.tensor(norm)).item()

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by before backward; 1 without fp16."""
        return self._engine.scaler.scale

    cur_scale = loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale is adjusted while training."""
        policy = self._engine.precision.loss_scale
        return policy is not None and policy.static is None

    @property
    def loss_scaler(self) -> LossScale:
        """The loss scale and how it changes."""
        return LossScale(self)

    @property
    def dp_process_group(self) -> Any:
        """torch's process group of the ranks that have batches of their own."""
        return self._engine.mesh.group("dp").pg

    def scaled_global_norm(self, norm_type: int = 2) -> float | None:
        """The norm of the last step's gradients as they were with the loss scale."""
        if norm_type != 2:
            raise NotProvidedError(
                f"optimizer.scaled_global_norm: norm_type: got {norm_type}, only 2"
            )
        norm = self._engine.grad_norm
        return None if norm is None else norm * self._engine.scaler.scale

    @property
    def _global_grad_norm(self) -> float | None:
        return self._engine.grad_norm

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        """Backward of a loss that the caller has divided by the micro-batches of a step."""
        self._engine.backward(loss, retain_graph=retain_graph, divides_by_accumulation=False)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """As `engine.step()`, which programs of DeepSpeed call themselves."""
        if closure is not None:
            raise NotProvidedError("optimizer.step: a closure is not provided; call engine.step()")
        self._engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what accumulates; at stages 2 and 3 nothing, as there only a step forgets it."""
        if self.zero_stage < 2:
            self._engine.zero_grad()

    def offload_states(
        self,
        include: Iterable[Any] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """As `engine.offload_states`. Collective."""
        offload_states(self._engine, include, device, pin_memory, non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """As `engine.reload_states`. Collective."""
        self._engine.reload_states(non_blocking)

    @torch.no_grad()
    def refresh_fp32_params(self) -> None:
        """Have the master copies follow weights that a program wrote into the model. Collective.

        At stage 3 nothing: `GatheredParameters` writes them into the master copies itself. Takes a
        copy of the model for as long as it runs.
        """
        if self.zero_stage < 3:
            # To set one writes its neighbours again as they were, so all are read first.
            written = [(each, each.clone()) for each in self._engine.module.parameters()]
            for param, value in written:
                safe_set_full_fp32_param(param, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: what an engine trains is fixed when it is made."""
        raise NotProvidedError(
            "optimizer.add_param_group: what an engine trains is fixed when it is made; give all "
            "groups to deepspeed.initialize"
        )

    def state_dict(self) -> dict[str, Any]:
        """What this rank holds of the optimizer's state, for the same number of ranks and stage."""
        held = self._engine.sharding.state_dict()
        state = {
            key: {name: _plain(value) for name, value in by_name.items()}
            for key, by_name in held["state"].items()
        }
        return {
            "optimizer_state_dict": {"state": state, "groups": held["groups"]},
            "loss_scaler": self._engine.scaler.state_dict(),
            "zero_stage": self.zero_stage,
        }

    @torch.no_grad()
    def load_state_dict(
        self, state_dict: dict[str, Any], load_optimizer_states: bool = True, **_: Any
    ) -> None:
        """Take over what `state_dict` gave on this rank. Collective.

        Raises NotProvidedError for the state of another optimizer, or of another stage or number of
        ranks: for these there are checkpoints.
        """
        if "optimizer_state_dict" not in state_dict:
            raise NotProvidedError(
                "optimizer.load_state_dict: got a state that optimizer.state_dict() of this "
                "package did not make; use engine.load_checkpoint, which also reads what "
                "DeepSpeed saved"
            )
        self._engine.scaler.load_state_dict(state_dict["loss_scaler"])
        if not load_optimizer_states:
            return
        sharding, saved = self._engine.sharding, state_dict["optimizer_state_dict"]
        sharding.prepare_load()
        own = sharding.state_dict()
        for key, by_name in own["state"].items():
            for name, value in by_name.items():
                if name in saved["state"].get(key, {}):
                    by_name[name] = _filled(key, name, value, saved["state"][key][name])
        sharding.load_state_dict({"state": own["state"], "groups": saved["groups"]})


class FP16_Optimizer(EngineOptimizer):  # noqa: N801 - the original's name
    """Of an engine that trains in fp16 without ZeRO."""


#: The original has one each for optimizers that it fuses and others.
FP16_UnfusedOptimizer = FP16_Optimizer


class BF16_Optimizer(EngineOptimizer):  # noqa: N801 - the original's name
    """Of an engine that trains in bf16 without ZeRO."""


class DeepSpeedZeroOptimizer(EngineOptimizer, ZeROOptimizer):
    """Of an engine at stage 1 or 2."""


class DeepSpeedZeroOptimizer_Stage3(EngineOptimizer, ZeROOptimizer):  # noqa: N801
    """Of an engine at stage 3."""


def optimizer_class(stage: int, compute: torch.dtype | None) -> type[EngineOptimizer]:
    """By which class programs know the optimizer of an engine.

    Args:
        stage: of ZeRO.
        compute: what the model computes in, if not as it was made.
    """
    if stage:
        return DeepSpeedZeroOptimizer_Stage3 if stage == 3 else DeepSpeedZeroOptimizer
    if compute is torch.float16:
        return FP16_Optimizer
    return BF16_Optimizer if compute is torch.bfloat16 else EngineOptimizer


class LossScale:
    """`optimizer.loss_scaler`: what losses are multiplied by before backward.

    Attributes:
        dynamic: whether it is adjusted while training.
    """

    def __init__(self, optimizer: EngineOptimizer) -> None:
        self._optimizer, self.dynamic = optimizer, optimizer.dynamic_loss_scale

    @property
    def loss_scale(self) -> float:
        """The present one; 1 without fp16."""
        return self._optimizer.loss_scale

    cur_scale = loss_scale


def offload_states(
    engine: Engine, include: Iterable[Any] | None, device: Any, pin_memory: bool, non_blocking: bool
) -> None:
    """Park state that rests in host memory; see `DeepSpeedEngine.offload_states`."""
    target = str(getattr(device, "value", device))
    if target == "none":
        logger.warning("offload_states: no device is named, so nothing is offloaded")
        return
    kinds = None if include is None else [str(getattr(kind, "value", kind)) for kind in include]
    engine.offload_states(kinds, target, pin_memory, non_blocking)


def _plain(value: Any) -> Any:
    if isinstance(value, FlatShard):
        with value.opened() as local:
            return local.detach().cpu().clone()
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _filled(key: str, name: str, own: Any, saved: Any) -> Any:
    if not isinstance(own, torch.Tensor):
        return saved
    with own.opened(fill=True) if isinstance(own, FlatShard) else nullcontext(own) as target:
        if target.shape != saved.shape:
            raise NotProvidedError(
                f"optimizer.load_state_dict: {key} of {name} has {saved.numel()} elements, and "
                f"this rank holds {target.numel()}; use engine.load_checkpoint, for any number of "
                f"ranks"
            )
        target.copy_(saved)
    return own
