"""The part of a stage 3 engine that gathers parameters, as libraries take it off and put it on."""

from __future__ import annotations

from typing import Any

from torch import nn

from deepspeed._names import names_of
from deepspeed._parameter_attributes import mark_model
from ds_zero import ShardError, ZeroOptimizer
from ds_zero.owners import owners_of

__getattr__, __dir__ = names_of(
    __name__,
    {},
    missing={"ZeROOrderedDict": "parameters are gathered by hooks; see deepspeed.zero"},
)


class DeepSpeedZeRoOffload:
    """What `engine.optimizer.parameter_offload` is at stage 3.

    Args:
        module: the engine's model.
        sharding: what holds its values.

    Attributes:
        module: the model.
        forward_hooks, backward_hooks: handles; `remove()` of the first takes the hooks that gather
            parameters off the model, inside `GatheredParameters` or after it.
        param_coordinator: answers what is asked of the original's.
    """

    def __init__(self, module: nn.Module, sharding: ZeroOptimizer) -> None:
        self.module = module
        self._sharding = sharding
        self.param_coordinator = ParameterCoordinator()
        self.forward_hooks: list[Any] = [_Hooks(sharding)]
        #: Hooks on the backward are on tensors, and go with them.
        self.backward_hooks: list[Any] = []

    def _register_deepspeed_module(self, module: nn.Module, count: Any = None) -> None:
        """Put the hooks back onto the model. Raises ShardError for another one."""
        if module is not self.module:
            raise ShardError(
                f"_register_deepspeed_module: got {type(module).__name__}, expected the engine's "
                f"own {type(self.module).__name__}; parameters are laid out when it is sharded"
            )
        self._sharding.restore_hooks()
        self.forward_hooks = [_Hooks(self._sharding)]

    def get_param_coordinator(self) -> ParameterCoordinator:
        """The same as `param_coordinator`."""
        return self.param_coordinator

    def empty_partition_cache(self) -> None:
        """Free what a forward without a backward left whole."""
        self._sharding.settle_states()

    def partition_all_parameters(self) -> None:
        """The same: between passes all parameters are sharded."""
        self._sharding.settle_states()


class ParameterCoordinator:
    """Says that no record of the order of use is out of date: ranks agree on each pass anew."""

    def is_invalid_trace(self) -> bool:
        """True: there is nothing to forget."""
        return True

    def _invalidate_trace(self) -> None:
        """Nothing to forget."""


class _Hooks:
    """A handle on all hooks that gather parameters."""

    def __init__(self, sharding: ZeroOptimizer) -> None:
        self._sharding = sharding

    def remove(self) -> None:
        """Take them off the model."""
        self._sharding.remove_hooks()


def parameter_offload(engine: Any) -> DeepSpeedZeRoOffload:
    """What libraries look for at `engine.optimizer.parameter_offload`, for an engine at stage 3.

    Gives the parameters and modules of `engine.module` their attributes, too. Raises ShardError if
    no parameter of it is sharded.
    """
    module: nn.Module = engine.module
    for owner, _ in owners_of(module.parameters()).values():
        mark_model(module, owner)
        return DeepSpeedZeRoOffload(module, owner)
    raise ShardError(
        "parameter_offload: no parameter of the engine's model is sharded; it is there at stage 3"
    )
