"""Who holds parameters, gradients and optimizer state, and who averages and updates them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ds_core import comm
from ds_core.precision import Precision
from ds_core.seams.transport import Transport


@runtime_checkable
class Sharding(Protocol):
    """What the engine asks of a sharding scheme, once it holds a model and an optimizer.

    Life of a step: any number of backwards (each averages gradients over ranks while it runs, or
    accumulates locally while `accumulate_locally` is set); then `grad_norm`, `update`, `zero_grad`.
    Every method is collective over the ranks that share the model.
    """

    accumulate_locally: bool
    reduces_each_backward: bool
    #: Whether backward itself takes the step, so that gradients cannot be scaled or left out.
    updates_in_backward: bool
    #: What the coming backward's gradients will be multiplied by, unless they are clipped; None
    #: where more backwards follow before the step. Whoever works ahead of a step may rely on it.
    expected_scale: float | None
    #: Why parameters and optimizer state do not belong to one step: an error ended an update, or
    #: what took part of it early, in the middle, or what it wrote is lost. None if they do. Set by
    #: the sharding (see `tearing`), on the rank that met the error; `load_state_dict` clears it.
    #: Whoever would use such values (a step, a save) refuses, naming it; members of this protocol
    #: that a load needs go on working.
    torn: str | None
    #: Called by the sharding before parameters or optimizer state change: by `update`, by a step
    #: that is taken in backward or ahead of time, or by its setters (`set_full_parameter`,
    #: `set_full_optimizer_state`, `prepare_load`, `load_state_dict`, `offload_states`), on the
    #: thread that runs backward or the setter. Does nothing unless someone, as the engine, lets it
    #: wait for a checkpoint that still reads them. May be called often; must not communicate.
    before_change: Callable[[], None]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, whose hyperparameters a schedule may change."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside accumulate locally."""

    def reduce_local(self) -> None:
        """Average now the gradients that only accumulated locally; nothing if there are none."""

    def grad_norm(self) -> torch.Tensor:
        """Global L2 norm of the averaged gradients: float64 on the CPU, equal on all ranks."""

    def update(self, grad_scale: float | torch.Tensor = 1.0) -> None:
        """Step with gradients times `grad_scale`; the model then holds the new parameters."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""

    def first_nonfinite(self) -> str | None:
        """Name of the first parameter of which this rank holds a non-finite gradient."""

    def full_parameter(self, which: str) -> torch.Tensor:
        """The most precise value of one parameter, whole on every rank."""

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Every parameter by name, whole, on the CPU."""

    def model_state(self) -> dict[str, Any]:
        """Parameters by name as a checkpoint holds them: tensors or `FlatShard`s."""

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state by name as a checkpoint holds it: {"state": ..., "groups": [...]}."""

    def prepare_load(self) -> None:
        """Allocate whatever state a checkpoint may fill in; torn until `load_state_dict`."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adopt the loaded `state_dict()`, whose tensors were filled in place, and publish.

        Nothing is torn afterwards: whoever fills only part of the tensors of one that is refuses.
        """

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds between steps, by kind."""

    def close(self) -> None:
        """Leave the model whole and free of hooks."""


class Tearable(Protocol):
    """What an error can leave between two steps."""

    torn: str | None


@contextmanager
def tearing(sharding: Tearable, doing: str) -> Iterator[None]:
    """An error in the block leaves `sharding.torn` telling it; the first one counts.

    doing: what was done, for the sentence "doing ended in the middle: ...".
    """
    try:
        yield
    except BaseException as error:  # an interrupt from the keyboard tears as well
        if sharding.torn is None:
            sharding.torn = f"{doing} ended in the middle: {type(error).__name__}: {error}"
        raise


def change_freely() -> None:
    """The `before_change` of a sharding that nobody reads beside its own thread."""


@runtime_checkable
class PassingState(Protocol):
    """A `Sharding` with optimizer state that other runs of the same model need not know."""

    def passing_state(self) -> Mapping[str, str]:
        """By key of such state, what a run loses now that does not take it over; "" for nothing."""


@runtime_checkable
class ParkableSharding(Protocol):
    """A `Sharding` whose state can leave its memory between two phases of a job. Collective."""

    def offload_states(
        self,
        include: Iterable[str] | None,
        device: str,
        pin_memory: bool,
        non_blocking: bool,
        *,
        folder: str | None,
    ) -> None:
        """Park the kinds of state that `include` names; None: all."""

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring them back, bit for bit."""


@runtime_checkable
class ReleasableSharding(Protocol):
    """A `Sharding` that can end without making the model whole."""

    def release(self) -> None:
        """Leave parameters where they are, free of hooks, and free the rest. Not collective."""


class ShardingFactory(Protocol):
    """What an entry point of the group `ds_core.sharding` is.

    The entry's name is the config section that it serves; `section` is that section's model. One
    whose `steps_on_host` is true lets the optimizer step on the CPU, and is given one that can.
    """

    def __call__(
        self,
        *,
        section: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        mesh: comm.Mesh,
        precision: Precision,
        transport: Transport,
        accumulation: int,
        scales_gradients: bool,
    ) -> Sharding | None:
        """Shard the model, or return None if the section asks for nothing.

        Args:
            section: of the config, as the entry's name says.
            model: on its device.
            optimizer: on the model's parameters, before its first step.
            mesh: the ranks.
            precision: dtypes of parameters, master copy and gradients.
            transport: how gradients travel.
            accumulation: micro-batches per step.
            scales_gradients: whether gradients are multiplied before the step, as for clipping or
                a loss scale.
        """


@runtime_checkable
class FullValues(Protocol):
    """A sharding whose values, gradients and states can be read and written whole, by name.

    Every method is collective over the ranks that share the model, with equal values on all.
    """

    def full_parameter(self, which: str) -> torch.Tensor:
        """The most precise value of one parameter."""

    def full_gradient(self, which: str) -> torch.Tensor | None:
        """The averaged gradient; None before a backward and for a frozen parameter."""

    def full_optimizer_state(self, which: str, key: str) -> torch.Tensor:
        """Optimizer state such as "exp_avg"; raises a DsError where there is none."""

    def set_full_parameter(self, which: str, value: torch.Tensor) -> None:
        """Overwrite a parameter, master copy included."""

    def set_full_gradient(self, which: str, value: torch.Tensor) -> None:
        """Overwrite an averaged gradient."""

    def set_full_optimizer_state(self, which: str, key: str, value: torch.Tensor) -> None:
        """Overwrite an optimizer state."""
