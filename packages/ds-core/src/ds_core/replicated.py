"""The default sharding: every rank holds everything (stage 0), gradients are all-reduced.

Per rank with P parameters of b bytes and fp32 Adam: 2 b P + 8 P bytes, and 4 P more for a master
copy. A step sends 2 (N-1)/N x b P bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ds_core import comm
from ds_core.agreement import check_same_model
from ds_core.backward import BackwardWatch
from ds_core.flat import FlatLayout
from ds_core.gradients import GradientReducer, vector_norm
from ds_core.optimizer_state import allocate_state, load_groups
from ds_core.precision import Precision
from ds_core.seams.transport import Dense, Transport

#: Gradients are reduced in messages of about this many bytes.
BUCKET_BYTES = 25 * 2**20


class _Bucket:
    """Parameters whose gradients lie in one flat buffer."""

    def __init__(
        self,
        index: int,
        named: list[tuple[str, nn.Parameter]],
        group: comm.Group,
        wire: Transport,
        dtype: torch.dtype | None,
    ) -> None:
        self.index, self.group, self._wire = index, group, wire
        self.names = [name for name, _ in named]
        self.params = [param for _, param in named]
        self.layout = FlatLayout.pack((name, tuple(p.shape)) for name, p in named)
        first = self.params[0]
        self.flat = torch.zeros(self.layout.numel, dtype=dtype or first.dtype, device=first.device)
        self.used = [False] * len(named)
        self._fresh = [True] * len(named)
        self._reduced = False

    def views(self) -> list[torch.Tensor]:
        return [self.flat[slot.offset : slot.end].view(slot.shape) for slot in self.layout.slots]

    def write_gradient(self, position: int, gradient: torch.Tensor, factor: float) -> None:
        self._reopen(factor)
        slot = self.layout.slots[position]
        target = self.flat[slot.offset : slot.end].view(slot.shape)
        if gradient.layout is not torch.strided:
            gradient = gradient.to_dense()
        if self._fresh[position]:
            torch.mul(gradient, factor, out=target)
        else:
            target.add_(gradient, alpha=factor)
        self._fresh[position], self.used[position] = False, True

    def _reopen(self, factor: float) -> None:
        """Accumulate on top of an average: equal on all ranks, so 1/N of it from each."""
        if self._reduced:
            self.flat.mul_(factor)
            self._reduced = False

    def start_reduce(self) -> comm.Pending:
        self._reopen(1.0 / self.group.size)
        for slot, fresh in zip(self.layout.slots, self._fresh, strict=True):
            if fresh:
                self.flat[slot.offset : slot.end].zero_()
        return self._wire.all_reduce(self.flat, self.group, caller=self.names[0])

    def finish_reduce(self) -> None:
        self._reduced = True
        self._fresh = [False] * len(self.params)

    def clear(self) -> None:
        self._reduced = False
        self.used = [False] * len(self.params)
        self._fresh = [True] * len(self.params)


class Replicated:
    """Plain data parallelism behind the `Sharding` seam.

    Args:
        model: on its device; cast to `precision.compute` if that is set.
        optimizer: on the model's parameters; with a master copy its groups are switched to it.
        mesh: gradients are averaged over its "dp" axis.
        broadcast: start from rank 0's values.

    Raises ModelMismatchError if the ranks' models differ. Collective.
    """

    reduces_each_backward = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        mesh: comm.Mesh,
        precision: Precision | None = None,
        transport: Transport | None = None,
        broadcast: bool = True,
    ) -> None:
        precision = precision or Precision()
        self.optimizer = optimizer
        self._group = mesh.group("dp")
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._all = dict(model.named_parameters())
        check_same_model(
            [
                (name, list(p.shape), str(p.dtype), "trained" if p.requires_grad else "frozen")
                for name, p in self._all.items()
            ],
            self._group,
        )
        self._master: dict[str, nn.Parameter] = {}
        self._broadcast_and_cast(precision, broadcast)
        self._buckets = _make_buckets(named, self._group, transport or Dense(), precision.grad)
        self._watch = BackwardWatch(model, self._begin, self._end)
        self._reducer = GradientReducer(self._buckets, self._watch.ensure_begun, _nothing)
        self._used: dict[str, bool] | None = None
        self._has_gradients = False

    def _broadcast_and_cast(self, precision: Precision, broadcast: bool) -> None:
        replaced: dict[int, nn.Parameter] = {}
        for name, param in self._all.items():
            if broadcast:
                comm.broadcast(param.data, self._group, caller=name)
            target = precision.compute
            if target is None or target == param.dtype or not param.dtype.is_floating_point:
                continue
            if precision.master is not None and param.requires_grad:
                master = nn.Parameter(param.data.to(precision.master, copy=True))
                self._master[name] = replaced[id(param)] = master
            param.data = param.data.to(target)
        for group in self.optimizer.param_groups if replaced else ():
            group["params"] = [replaced.get(id(p), p) for p in group["params"]]

    def __str__(self) -> str:
        return "none: every rank holds everything"

    # ------------------------------------------------------------------ backward

    def _begin(self) -> None:
        self._used = None
        self._has_gradients = True
        self._reducer.begin()

    def _end(self) -> None:
        self._reducer.finish()

    def _settle(self) -> None:
        """Before a step: local gradients become averages; without any backward all are zero."""
        self._reducer.settle()
        if not self._has_gradients:
            for bucket in self._buckets:
                bucket.flat.zero_()

    @property
    def accumulate_locally(self) -> bool:
        """Whether backwards leave out the all-reduce for now."""
        return not self._reducer.sync

    @accumulate_locally.setter
    def accumulate_locally(self, value: bool) -> None:
        self._reducer.sync = not value

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside accumulate locally."""
        return self._reducer.no_sync()

    # ------------------------------------------------------------------ step

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optimizer.param_groups

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """Global L2 norm of the averaged gradients; computed locally, they are equal anyway."""
        self._settle()
        norms = [vector_norm(bucket.flat) for bucket in self._buckets]
        return torch.stack(norms).double().square_().sum().sqrt_().cpu()

    @torch.no_grad()
    def update(self, grad_scale: float | torch.Tensor = 1.0) -> None:
        """Step with gradients times `grad_scale`; parameters that no rank used are left alone."""
        self._settle()
        used = self._used_anywhere()
        scaled = not (isinstance(grad_scale, float) and grad_scale == 1.0)
        for bucket in self._buckets:
            if scaled:
                bucket.flat.mul_(grad_scale)
            for name, param, view in zip(bucket.names, bucket.params, bucket.views(), strict=True):
                target = self._master.get(name, param)
                target.grad = view.to(target.dtype) if used[name] else None
        self.optimizer.step()
        for bucket in self._buckets:
            for name, param in zip(bucket.names, bucket.params, strict=True):
                target = self._master.get(name, param)
                target.grad = None
                if target is not param:
                    param.data.copy_(target)

    def _used_anywhere(self) -> dict[str, bool]:
        if self._used is None:
            names = [name for bucket in self._buckets for name in bucket.names]
            flags = [flag for bucket in self._buckets for flag in bucket.used]
            votes = torch.tensor(flags, dtype=torch.float32, device=self._group.control_device())
            comm.all_reduce(votes, self._group, op="max", caller="used parameters")
            self._used = dict(zip(names, (votes > 0).tolist(), strict=True))
        return self._used

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; their buffers stay."""
        self._used = None
        self._has_gradients = False
        self._reducer.forget()
        for bucket in self._buckets:
            bucket.clear()

    def first_nonfinite(self) -> str | None:
        """Name of the first parameter whose gradient is not finite."""
        for bucket in reversed(self._buckets):
            for name, view in zip(bucket.names, bucket.views(), strict=True):
                if not bool(torch.isfinite(view).all()):
                    return name
        return None

    # ------------------------------------------------------------------ state

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Every parameter by name, copied to the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self._all.items()}

    def model_state(self) -> dict[str, Any]:
        """The most precise copy of every parameter."""
        return {name: self._master.get(name, p).detach() for name, p in self._all.items()}

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state by parameter name."""
        names = {id(self._master.get(name, p)): name for name, p in self._all.items()}
        state: dict[str, dict[str, Any]] = {}
        for param, values in self.optimizer.state.items():
            for key, value in values.items():
                state.setdefault(key, {})[names[id(param)]] = value
        groups = [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "names": sorted(names[id(param)] for param in group["params"]),
            }
            for group in self.param_groups
        ]
        return {"state": state, "groups": groups}

    def prepare_load(self) -> None:
        """Allocate optimizer state by a step that changes nothing."""
        allocate_state(self.optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adopt loaded state."""
        load_groups(self.param_groups, state_dict["groups"])
        with torch.no_grad():
            for name, master in self._master.items():
                self._all[name].data.copy_(master)

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds between steps, by kind."""
        return {
            "parameters": _bytes(self._all.values()),
            "gradients": _bytes(bucket.flat for bucket in self._buckets),
            "master": _bytes(self._master.values()),
            "optimizer": _bytes(
                value
                for values in self.optimizer.state.values()
                for value in values.values()
                if torch.is_tensor(value) and value.dim()
            ),
            "padding": 0,
        }

    def close(self) -> None:
        """Remove every hook."""
        self._reducer.close()
        self._watch.close()


def _make_buckets(
    named: dict[str, nn.Parameter],
    group: comm.Group,
    wire: Transport,
    dtype: torch.dtype | None,
) -> list[_Bucket]:
    runs: dict[torch.dtype, list[tuple[str, nn.Parameter]]] = {}
    buckets: list[_Bucket] = []
    for name, param in named.items():
        run = runs.setdefault(param.dtype, [])
        run.append((name, param))
        if sum(p.numel() * p.element_size() for _, p in run) >= BUCKET_BYTES:
            buckets.append(_Bucket(len(buckets), runs.pop(param.dtype), group, wire, dtype))
    for run in runs.values():
        buckets.append(_Bucket(len(buckets), run, group, wire, dtype))
    return buckets


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _nothing(bucket: _Bucket) -> None:
    """Nothing is freed when a bucket's gradients are complete."""
