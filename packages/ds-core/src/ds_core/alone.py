"""One rank on its own: gradients stay where autograd puts them, and nothing is sent.

With P parameters of b bytes and fp32 Adam: 2 b P + 8 P bytes, and 4 P more for a master copy; the
gradients' b P only from a backward until the next `zero_grad`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ds_core import comm, fused
from ds_core.errors import DsError
from ds_core.precision import Precision
from ds_core.whole_model import WholeModel


class Alone(WholeModel):
    """The `Sharding` of a single rank: a plain PyTorch step behind the seam.

    Args:
        model: on its device; cast to `precision.compute` if that is set.
        optimizer: on the model's parameters; with a master copy its groups are switched to it.
        mesh: of one rank along "dp".
        precision: number formats; gradients accumulate in the dtype of the parameters.
        sparse: whether sparse gradients reach the optimizer as they are; else they become dense.
    """

    accumulate_locally = False
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
        sparse: bool = False,
    ) -> None:
        super().__init__(
            model, optimizer, mesh.group("dp"), precision or Precision(), broadcast=False
        )
        #: Each trained parameter, and what the optimizer updates for it.
        self._targets = [(param, self._target(name)) for name, param in self._trained().items()]
        self._sparse = sparse
        self._wide = torch.float32
        for param, _ in self._targets:
            self._wide = torch.promote_types(self._wide, param.dtype)

    def __str__(self) -> str:
        return "none: one rank holds everything"

    def no_sync(self) -> AbstractContextManager[None]:
        """Nothing is ever sent."""
        return nullcontext()

    def reduce_local(self) -> None:
        """Nothing is ever sent."""

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """Global L2 norm of the gradients."""
        self._settle_layouts()
        gradients = [_values(p.grad) for p, _ in self._targets if p.grad is not None]
        if not gradients:
            return torch.zeros((), dtype=torch.float64)
        norms = torch._foreach_norm(gradients, 2, dtype=self._wide)
        return torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64).cpu()

    def _settle_layouts(self) -> None:
        """Sparse gradients become dense, or have each index once."""
        for param, _ in self._targets:
            gradient = param.grad
            if gradient is not None and gradient.layout is not torch.strided:
                param.grad = gradient.coalesce() if self._sparse else gradient.to_dense()

    @torch.no_grad()
    def update(self, grad_scale: float | torch.Tensor = 1.0) -> None:
        """Step with gradients times `grad_scale`; parameters that were not used are left alone."""
        self._settle_layouts()
        if fused.is_one_pass(self.optimizer):
            self._update_in_one_pass(grad_scale)
            return
        for name, master in self._master.items():
            gradient = self._parameters[name].grad
            master.grad = None if gradient is None else gradient.to(master.dtype)
        if isinstance(grad_scale, float) and grad_scale == 1.0:
            self.optimizer.step()
        elif fused.fuses_scale(self.optimizer) and self._targets:
            fused.step_scaled(self.optimizer, grad_scale, self._targets[0][0].device)
        else:
            grads = [_values(target.grad) for _, target in self._targets if target.grad is not None]
            fused.multiply(grads, grad_scale)
            self.optimizer.step()
        for master in self._master.values():
            master.grad = None
        self._publish()

    def _update_in_one_pass(self, grad_scale: float | torch.Tensor) -> None:
        gradients: dict[torch.Tensor, torch.Tensor] = {}
        copies: dict[torch.Tensor, torch.Tensor] = {}
        for param, target in self._targets:
            if param.grad is not None:
                gradients[target] = param.grad
                if target is not param:
                    copies[target] = param.data
        fused.step_in_one_pass(self.optimizer, gradients, copies, grad_scale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for param, _ in self._targets:
            param.grad = None

    def full_gradient(self, which: str) -> torch.Tensor | None:
        """The gradient of one parameter; None before a backward and for a frozen one."""
        gradient = self._named(which).grad
        if gradient is None or gradient.layout is torch.strided:
            return gradient
        return gradient.to_dense()

    @torch.no_grad()
    def set_full_gradient(self, which: str, value: torch.Tensor) -> None:
        """Overwrite the gradient of one parameter."""
        param = self._named(which)
        if not param.requires_grad:
            raise DsError(f"{which!r} is frozen: it has no gradient")
        param.grad = value.detach().to(param.dtype, copy=True)

    def first_nonfinite(self) -> str | None:
        """Name of the first parameter whose gradient is not finite."""
        self._settle_layouts()
        for name, param in reversed(self._trained().items()):
            if param.grad is not None and not bool(torch.isfinite(_values(param.grad)).all()):
                return name
        return None

    def close(self) -> None:
        """Drop the gradients; there are no hooks."""
        self.zero_grad()


def _values(gradient: torch.Tensor) -> torch.Tensor:
    """The elements of a gradient that are stored."""
    return gradient if gradient.layout is torch.strided else gradient._values()
