"""Models that checkpoint by themselves: what they keep is kept as a policy says."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ds_core.activation_checkpointing.policy import Policy
from ds_core.activation_checkpointing.region import Region
from ds_core.errors import DsError

logger = logging.getLogger(__name__)

#: Where models of Hugging Face's transformers put the function that checkpoints a layer.
_FUNCTION, _IS_ON = "_gradient_checkpointing_func", "gradient_checkpointing"


class StoredInputs(AbstractContextManager["StoredInputs"]):
    """The modules that `store_inputs` has changed, until `remove` or the end of a `with`.

    Attributes:
        names: their qualified names.
    """

    def __init__(self, modules: dict[str, nn.Module], policy: Policy) -> None:
        self._before = {module: module.__dict__[_FUNCTION] for module in modules.values()}
        self.names = tuple(modules)
        for module, function in self._before.items():
            module.__dict__[_FUNCTION] = functools.partial(_stored, function, policy)

    def remove(self) -> None:
        """Give the modules their own function back; backwards that are to come are not touched."""
        for module, function in self._before.items():
            module.__dict__[_FUNCTION] = function
        self._before.clear()

    def __exit__(self, *error: object) -> None:
        self.remove()


def store_inputs(model: nn.Module, policy: Policy | None = None) -> StoredInputs:
    """Keep what a model's own gradient checkpointing keeps on the host, split, or both.

    For models of Hugging Face's transformers after `model.gradient_checkpointing_enable()`, with
    and without use_reentrant. Only positional arguments of a layer, its hidden states, are saved by
    them, so only these are moved. Named random states are drawn alike too.

        with store_inputs(model):
            loss = model(**batch).loss
        loss.backward()

    Args:
        model: changed in place.
        policy: where inputs are kept; its other settings play no part; default:
            `Policy(offload_to_cpu=True)`.

    Raises DsError if no module of the model checkpoints, or if the policy moves nothing.
    """
    policy = policy or Policy(offload_to_cpu=True)
    if policy.storage is None:
        raise DsError(
            "store_inputs: the policy leaves inputs where they are; set offload_to_cpu or "
            "partition_group"
        )
    found = {
        name: module
        for name, module in model.named_modules()
        if module.__dict__.get(_IS_ON) is True and callable(module.__dict__.get(_FUNCTION))
    }
    if not found:
        raise DsError(
            f"store_inputs: no module of {type(model).__name__} checkpoints; call "
            f"model.gradient_checkpointing_enable() before (models of transformers), or use "
            f"checkpoint_blocks"
        )
    logger.info("inputs of checkpointed layers are stored by the policy in %s", ", ".join(found))
    return StoredInputs(found, policy)


def _stored(
    function: Callable[..., Any], policy: Policy, fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return function(fn, *args, **kwargs)
    with policy.saving():
        return function(Region(fn), *args, **kwargs)
