"""The Hessian of a loss as a linear map: one product costs about one backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_core.errors import DsError


def twice_differentiable() -> AbstractContextManager[Any]:
    """A context for the forward: attention computed from products, whose backward has one too.

    The fused kernels of scaled_dot_product_attention can be differentiated once only. `Hessian`
    enters it by itself for what activation checkpointing computes again.
    """
    return sdpa_kernel(SDPBackend.MATH)


class Hessian:
    """Second derivatives of a scalar loss by some of its parameters: symmetric, `[n, n]`.

    Parameters elsewhere in the model are held fixed, so for those of one block it is a block on the
    diagonal of the whole. Vectors are flat, `[n]`, fp32 (fp64 for fp64 parameters), on the
    parameters' device.

    Args:
        loss: a scalar with its graph; compute attention under `twice_differentiable()`.
        parameters: those that need a gradient are taken, in this order.
        average: makes a flat vector its mean over the ranks, in place, where each has a loss of
            its own; then every method is collective, and tells of the mean of the losses.

    Raises DsError if there is no parameter to differentiate by, or the loss has no graph.

    Source of the products: Pearlmutter 1994, "Fast Exact Multiplication by the Hessian".
    """

    def __init__(
        self,
        loss: torch.Tensor,
        parameters: Iterable[torch.Tensor],
        *,
        average: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise DsError("Hessian: none of the parameters needs a gradient")
        if loss.numel() != 1 or not loss.requires_grad:
            raise DsError(
                f"Hessian: expected a scalar loss with its graph, got shape {list(loss.shape)}, "
                f"requires_grad={loss.requires_grad}"
            )
        self._average = average
        with twice_differentiable():
            self._gradients = torch.autograd.grad(
                loss, self._parameters, create_graph=True, materialize_grads=True
            )
        first = self._parameters[0]
        self.dtype = torch.float64 if first.dtype is torch.float64 else torch.float32
        self.device = first.device

    @property
    def size(self) -> int:
        """The number n of elements of the parameters."""
        return sum(parameter.numel() for parameter in self._parameters)

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """The Hessian times `vector`. vector: `[n]`. Returns `[n]`.

        Raises DsError if an operation of the loss has no second derivative.
        """
        pieces = vector.split([parameter.numel() for parameter in self._parameters])
        directions = [
            piece.view(parameter.shape).to(parameter.dtype)
            for piece, parameter in zip(pieces, self._parameters, strict=True)
        ]
        # A gradient that does not depend on any parameter (of a linear loss) has no second one.
        curved = [
            (gradient, direction)
            for gradient, direction in zip(self._gradients, directions, strict=True)
            if gradient.requires_grad
        ]
        if curved:
            found = self._differentiated([g for g, _ in curved], [d for _, d in curved])
            result = torch.cat([piece.detach().flatten().to(self.dtype) for piece in found])
        else:
            result = torch.zeros_like(vector)
        if self._average is not None:
            self._average(result)
        return result

    def _differentiated(
        self, gradients: list[torch.Tensor], directions: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        try:
            with twice_differentiable():
                return torch.autograd.grad(
                    gradients,
                    self._parameters,
                    grad_outputs=directions,
                    retain_graph=True,
                    materialize_grads=True,
                )
        except RuntimeError as error:
            if "derivative" not in str(error):
                raise
            raise DsError(
                f"Hessian: an operation of the loss cannot be differentiated twice ({error}); "
                f"compute it under ds_core.curvature.twice_differentiable()"
            ) from error

    def random(self, generator: torch.Generator, *, signs: bool = False) -> torch.Tensor:
        """A random `[n]` vector: normal, or of signs (+1 or -1) only.

        generator: on the CPU, so that all ranks and devices draw the same.
        """
        if signs:
            drawn = torch.randint(0, 2, (self.size,), generator=generator) * 2 - 1
        else:
            drawn = torch.randn(self.size, generator=generator)
        return drawn.to(self.device, self.dtype)
