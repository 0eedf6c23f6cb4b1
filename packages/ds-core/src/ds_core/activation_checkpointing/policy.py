"""How a piece of a forward is computed again: over torch's non-reentrant checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ds_core.accelerator import Accelerator
from ds_core.activation_checkpointing.rng_states import RngStates


def checkpoint(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`fn(*args, **kwargs)`, whose intermediate tensors are computed again in backward.

    Only the arguments are kept. Values and gradients are those of a plain call: random numbers are
    drawn alike, autocast is as it was. May be nested, and works at every ZeRO stage. Without
    gradients it is the plain call. All keyword arguments are those of `fn`: settings are a
    `Policy`'s.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (1604.06174).
    """
    return Policy()(fn, *args, **kwargs)


@dataclass(frozen=True)
class Policy:
    """Settings of `checkpoint`; an instance is called in its place.

    Attributes:
        offload_to_cpu: whether the arguments wait in (pinned) host memory for the backward. The
            copies are torch's `save_on_cpu`: they do not overlap with compute.
        synchronize: whether the device is waited for before and after, so that times taken around
            are those of the piece itself.
        rng_states: named states that `fn` draws from, so that it draws alike the second time.
        statistics: modules with running statistics (batch norms), which move in the first pass
            only.
    """

    offload_to_cpu: bool = False
    synchronize: bool = False
    rng_states: RngStates | None = None
    statistics: tuple[nn.Module, ...] = ()

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`fn(*args, **kwargs)`; see `checkpoint`."""
        if not torch.is_grad_enabled():
            return fn(*args, **kwargs)
        names, count = tuple(kwargs), len(args)

        # Torch keeps positional tensors as autograd keeps any, so hooks on saved tensors see them.
        def run(*values: Any) -> Any:
            return fn(*values[:count], **dict(zip(names, values[count:], strict=True)))

        settings: dict[str, Any] = {"use_reentrant": False}
        if self.rng_states is not None or self.statistics:
            settings["context_fn"] = self._contexts
        device = _device_of((*args, *kwargs.values()))
        self._wait(device)
        with self._storage(device):
            output = torch_checkpoint(run, *args, *kwargs.values(), **settings)
        self._wait(device)
        return output

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _SecondPass(self.rng_states, self.statistics)

    def _storage(self, device: torch.device) -> AbstractContextManager[Any]:
        if not self.offload_to_cpu:
            return nullcontext()
        return save_on_cpu(pin_memory=device.type != "cpu", device_type=device.type)

    def _wait(self, device: torch.device) -> None:
        if self.synchronize:
            Accelerator(device.type).synchronize()


class _SecondPass(AbstractContextManager[None]):
    """Around a recomputation: named random states as in the first pass, statistics untouched."""

    def __init__(self, states: RngStates | None, modules: Sequence[nn.Module]) -> None:
        self._states, self._modules = states, modules
        self._first = None if states is None else states.state_dict()
        self._present: dict[str, torch.Tensor] = {}
        self._buffers: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        if self._states is not None and self._first is not None:
            self._present = self._states.state_dict()
            self._states.load_state_dict(self._first)
        # Copies take the second update; the real buffers are not even written to, because what
        # autograd saved of them must stay as it was.
        self._buffers = [dict(module._buffers) for module in self._modules]
        for module, buffers in zip(self._modules, self._buffers, strict=True):
            for name, buffer in buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()

    def __exit__(self, *error: object) -> None:
        for module, buffers in zip(self._modules, self._buffers, strict=True):
            module._buffers.update(buffers)
        if self._states is not None:
            self._states.load_state_dict(self._present)


def _device_of(values: Sequence[Any]) -> torch.device:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")
