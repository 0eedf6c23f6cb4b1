"""The default sharding: every rank holds everything (stage 0), gradients are all-reduced.

Per rank with P parameters of b bytes and fp32 Adam: 2 b P + 8 P bytes, and 4 P more for a master
copy. A step sends 2 (N-1)/N x b P bytes. Gradients of embeddings made with `sparse=True` travel as
rows and indices, if that is asked for.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from ds_core import comm, fused
from ds_core.backward import BackwardWatch
from ds_core.errors import DsError
from ds_core.flat import FlatLayout
from ds_core.flat_gradient import FlatGradient
from ds_core.gradients import GradientReducer, vector_norm
from ds_core.precision import Precision
from ds_core.seams.transport import Dense, Transport
from ds_core.sparse_gradient import SparseGradient, sparse_parameters
from ds_core.whole_model import WholeModel, num_bytes

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
        first = self.params[0]
        layout = FlatLayout.pack((name, tuple(p.shape)) for name, p in named)
        self._gradient = FlatGradient(layout, dtype or first.dtype, first.device)
        self._reduced = False

    @property
    def used(self) -> list[bool]:
        return self._gradient.used

    @property
    def num_bytes(self) -> int:
        return num_bytes([self._gradient.flat])

    def gradients(self) -> list[torch.Tensor]:
        return self._gradient.views

    def stored(self) -> torch.Tensor:
        return self._gradient.flat

    def write_gradient(self, position: int, gradient: torch.Tensor, factor: float) -> None:
        if self._reduced:
            self._reopen()
        self._gradient.write(position, gradient, factor)

    def _reopen(self) -> None:
        """Accumulate on top of an average: equal on all ranks, so 1/N of it from each."""
        self._gradient.flat.mul_(1.0 / self.group.size)
        self._reduced = False

    def start_reduce(self) -> comm.Pending:
        if self._reduced:
            self._reopen()
        return self._wire.all_reduce(self._gradient.complete(), self.group, caller=self.names[0])

    def finish_reduce(self) -> None:
        self._reduced = True
        self._gradient.keep()

    def set_zero(self) -> None:
        self._gradient.flat.zero_()

    def clear(self) -> None:
        self._reduced = False
        self._gradient.forget()


class Replicated(WholeModel):
    """Plain data parallelism behind the `Sharding` seam.

    Args:
        model: on its device; cast to `precision.compute` if that is set.
        optimizer: on the model's parameters; with a master copy its groups are switched to it.
        mesh: gradients are averaged over its "dp" axis.
        precision: number formats.
        transport: how gradients travel; default: as they are.
        broadcast: start from rank 0's values.
        sparse: whether sparse gradients travel, and reach the optimizer, as rows and indices; else
            they become dense.

    Raises ModelMismatchError if the ranks' models differ. Collective.
    """

    reduces_each_backward = False
    updates_in_backward = False
    expected_scale: float | None = 1.0

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        mesh: comm.Mesh,
        precision: Precision | None = None,
        transport: Transport | None = None,
        broadcast: bool = True,
        sparse: bool = False,
    ) -> None:
        precision = precision or Precision()
        self._group = mesh.group("dp")
        super().__init__(model, optimizer, self._group, precision, broadcast=broadcast)
        self._buckets = _make_buckets(
            self._trained(),
            sparse_parameters(model) if sparse else set(),
            self._group,
            transport or Dense(),
            precision.grad,
        )
        self._watch = BackwardWatch(model, self._begin, self._end)
        self._reducer = GradientReducer(self._buckets, self._watch.ensure_begun, _nothing)
        self._used: dict[str, bool] | None = None
        self._has_gradients = False

    def __str__(self) -> str:
        return "none: every rank holds everything"

    # ------------------------------------------------------------------ backward

    def _begin(self) -> None:
        self._used = None
        self._has_gradients = True
        self._reducer.begin()

    def _end(self) -> None:
        self._reducer.finish()

    def reduce_local(self) -> None:
        """Average the gradients that only accumulated locally. Collective."""
        self._reducer.settle()

    def _settle(self) -> None:
        """Before a step: local gradients become averages; without any backward all are zero."""
        self._reducer.settle()
        if not self._has_gradients:
            for bucket in self._buckets:
                bucket.set_zero()

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

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """Global L2 norm of the averaged gradients; computed locally, they are equal anyway."""
        self._settle()
        norms = [vector_norm(bucket.stored()) for bucket in self._buckets]
        return torch.stack(norms).double().square_().sum().sqrt_().cpu()

    @torch.no_grad()
    def update(self, grad_scale: float | torch.Tensor = 1.0) -> None:
        """Step with gradients times `grad_scale`; parameters that no rank used are left alone."""
        self._settle()
        used = self._used_anywhere()
        if fused.is_one_pass(self.optimizer):
            self._update_in_one_pass(used, grad_scale)
            return
        is_one = isinstance(grad_scale, float) and grad_scale == 1.0
        in_kernel = not is_one and fused.fuses_scale(self.optimizer)
        targets = []
        for bucket in self._buckets:
            if not is_one and not in_kernel:
                bucket.stored().mul_(grad_scale)
            for name, view in zip(bucket.names, bucket.gradients(), strict=True):
                target = self._target(name)
                target.grad = view.to(target.dtype) if used[name] else None
                targets.append(target)
        if in_kernel:
            fused.step_scaled(self.optimizer, grad_scale, targets[0].device)
        else:
            self.optimizer.step()
        for target in targets:
            target.grad = None
        self._publish()

    def _update_in_one_pass(self, used: dict[str, bool], grad_scale: float | torch.Tensor) -> None:
        gradients: dict[torch.Tensor, torch.Tensor] = {}
        copies: dict[torch.Tensor, torch.Tensor] = {}
        for bucket in self._buckets:
            for name, view in zip(bucket.names, bucket.gradients(), strict=True):
                if used[name]:
                    target, param = self._target(name), self._parameters[name]
                    gradients[target] = view
                    if target is not param:
                        copies[target] = param.data
        fused.step_in_one_pass(self.optimizer, gradients, copies, grad_scale)

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

    def full_gradient(self, which: str) -> torch.Tensor | None:
        """The averaged gradient of one parameter; None before a backward and for a frozen one.

        Collective if gradients only accumulated locally so far.
        """
        self._named(which)
        if not self._has_gradients:
            return None
        self._settle()
        view = self._gradient_of(which)
        if view is None:
            return None
        return view.detach().clone() if view.layout is torch.strided else view.to_dense()

    @torch.no_grad()
    def set_full_gradient(self, which: str, value: torch.Tensor) -> None:
        """Overwrite the averaged gradient of one parameter; all ranks give the same value."""
        self._named(which)
        self._settle()
        view = self._gradient_of(which)
        if view is None:
            raise DsError(f"{which!r} is frozen: it has no gradient")
        if view.layout is not torch.strided:
            raise DsError(f"{which!r} has a sparse gradient, which cannot be overwritten")
        view.copy_(value)
        self._has_gradients = True
        for bucket in self._buckets:
            if which in bucket.names:
                bucket.used[bucket.names.index(which)] = True
        self._used = None

    def _gradient_of(self, which: str) -> torch.Tensor | None:
        for bucket in self._buckets:
            if which in bucket.names:
                return bucket.gradients()[bucket.names.index(which)]
        return None

    def first_nonfinite(self) -> str | None:
        """Name of the first parameter whose gradient is not finite."""
        for bucket in reversed(self._buckets):
            if not bool(torch.isfinite(bucket.stored()).all()):
                for name, view in zip(bucket.names, bucket.gradients(), strict=True):
                    values = view if view.layout is torch.strided else view._values()
                    if not bool(torch.isfinite(values).all()):
                        return name
        return None

    def _gradient_bytes(self) -> int:
        return sum(bucket.num_bytes for bucket in self._buckets)

    def close(self) -> None:
        """Remove every hook."""
        self._reducer.close()
        self._watch.close()


def _make_buckets(
    named: dict[str, nn.Parameter],
    sparse: set[int],
    group: comm.Group,
    wire: Transport,
    dtype: torch.dtype | None,
) -> list[_Bucket | SparseGradient]:
    runs: dict[torch.dtype, list[tuple[str, nn.Parameter]]] = {}
    buckets: list[_Bucket | SparseGradient] = []
    for name, param in named.items():
        if id(param) in sparse:
            buckets.append(SparseGradient(len(buckets), name, param, group, dtype))
            continue
        run = runs.setdefault(param.dtype, [])
        run.append((name, param))
        if num_bytes(p for _, p in run) >= BUCKET_BYTES:
            buckets.append(_Bucket(len(buckets), runs.pop(param.dtype), group, wire, dtype))
    for run in runs.values():
        buckets.append(_Bucket(len(buckets), run, group, wire, dtype))
    return buckets


def _nothing(bucket: _Bucket | SparseGradient) -> None:
    """Nothing is freed when a bucket's gradients are complete."""
