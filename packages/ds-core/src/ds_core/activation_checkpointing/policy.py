"""How a piece of a forward is computed again: over torch's non-reentrant checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ds_core import comm
from ds_core.accelerator import Accelerator
from ds_core.activation_checkpointing.host_offload import HostOffload, shared_offload
from ds_core.activation_checkpointing.region import Region, present
from ds_core.activation_checkpointing.storage import InputStorage


def checkpoint(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`fn(*args, **kwargs)`, whose intermediate tensors are computed again in backward.

    Only the arguments are kept. Values and gradients are those of a plain call: random numbers are
    drawn alike, named ones (`RngStates`) too, autocast is as it was. May be nested, and works at
    every ZeRO stage. Without gradients it is the plain call. All keyword arguments are those of
    `fn`: settings are a `Policy`'s.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (1604.06174).
    """
    return Policy()(fn, *args, **kwargs)


@dataclass(frozen=True)
class Policy:
    """Settings of `checkpoint`; an instance is called in its place, for all blocks of a model.

    Tensors among the arguments, also in tuples, lists and dicts, are kept as the settings say. Of a
    checkpoint inside another only the outer one's are: the inner one's are computed again.
    torch.compile leaves out what a policy that moves them calls; compile that itself.

    Attributes:
        offload_to_cpu: whether they wait in pinned host memory for the backward; copies overlap
            with compute in both directions. True: as `HostOffload()` does it. Tensors on a CPU
            are there already.
        partition_group: ranks that all hold the same arguments, such as `mesh.group("tp")`; each
            keeps 1/N of them, and they are gathered before the piece is computed again. Then
            every call and its backward is collective over them. A group of one changes nothing.
        reuses_buffers: whether what is left of them on the device lies in buffers that are used
            from step to step. Only with `partition_group`: else they lie where the model put them.
        synchronize: whether the device is waited for before and after, so that times taken around
            are those of the piece itself.
        statistics: modules with running statistics (batch norms), which move in the first pass
            only.
        storage: made of the first three; given, it is used in their place.
    """

    offload_to_cpu: bool | HostOffload = False
    partition_group: comm.Group | None = None
    reuses_buffers: bool = False
    synchronize: bool = False
    statistics: tuple[nn.Module, ...] = ()
    storage: InputStorage | None = None

    def __post_init__(self) -> None:
        if self.storage is not None or not (
            self.offload_to_cpu or self.partition_group is not None
        ):
            return
        given = self.offload_to_cpu
        offload = given if isinstance(given, HostOffload) else shared_offload() if given else None
        storage = InputStorage(offload, self.partition_group, reuses_buffers=self.reuses_buffers)
        object.__setattr__(self, "storage", storage)

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`fn(*args, **kwargs)`; see `checkpoint`."""
        if not torch.is_grad_enabled():
            return fn(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))

        # Torch keeps positional tensors as autograd keeps any, so hooks on saved tensors see them.
        def run(*values: Any) -> Any:
            own_args, own_kwargs = tree_unflatten(values, structure)
            return fn(*own_args, **own_kwargs)

        settings: dict[str, Any] = {"use_reentrant": False}
        if self.statistics:
            settings["context_fn"] = self._contexts
        if torch.compiler.is_compiling() and self.storage is None:
            return torch_checkpoint(run, *leaves, **settings)
        return self._run(run, leaves, settings)

    @torch._disable_dynamo
    def _run(self, run: Callable[..., Any], leaves: list[Any], settings: dict[str, Any]) -> Any:
        device = _device_of(leaves)
        self._wait(device)
        with self.saving():
            output = torch_checkpoint(Region(run), *leaves, **settings)
        self._wait(device)
        return output

    def saving(self) -> AbstractContextManager[Any]:
        """The context in which a checkpoint saves the inputs of the next block."""
        if self.storage is None or present() is not None:
            return nullcontext()
        return self.storage.saving()

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _StillStatistics(self.statistics)

    def _wait(self, device: torch.device) -> None:
        if self.synchronize:
            Accelerator(device.type).synchronize()


class _StillStatistics(AbstractContextManager[None]):
    """Around a recomputation: running statistics stay untouched."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._buffers: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        # Copies take the second update; the real buffers are not even written to, because what
        # autograd saved of them must stay as it was.
        self._buffers = [dict(module._buffers) for module in self._modules]
        for module, buffers in zip(self._modules, self._buffers, strict=True):
            for name, buffer in buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()

    def __exit__(self, *error: object) -> None:
        for module, buffers in zip(self._modules, self._buffers, strict=True):
            module._buffers.update(buffers)


def _device_of(values: Sequence[Any]) -> torch.device:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")
