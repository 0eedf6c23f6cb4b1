"""The gradient of one embedding as rows and their indices: what a rank did not touch is not sent.

With K rows of D elements touched on the rank that touched most, and N ranks, a rank sends
(N-1) K (D b + 8) bytes, b the bytes of an element; dense it would be 2 (N-1)/N x rows x D b.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ds_core import comm


def sparse_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters whose gradients are sparse: weights of embeddings with `sparse=True`.

    A weight that another module uses as well (a tied head) gets dense gradients too, and is not
    among them.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), []).append(module)
    return {
        key
        for key, modules in owners.items()
        if all(isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse for m in modules)
    }


class SparseGradient:
    """A bucket of one parameter (`ds_core.gradients.Bucket`) that gathers rows over the ranks.

    Args:
        index: position among all buckets, the same on all ranks.
        name: of the parameter.
        param: `[rows, ...]`.
        group: ranks over which the gradient is averaged.
        dtype: in which it accumulates and travels; None: the parameter's.
    """

    def __init__(
        self,
        index: int,
        name: str,
        param: nn.Parameter,
        group: comm.Group,
        dtype: torch.dtype | None,
    ) -> None:
        self.index, self.group = index, group
        self.names, self.params = [name], [param]
        self._dtype = dtype or param.dtype
        # The average so far, and what was added on this rank since; each index once.
        self._average = self._local = self._empty()
        self.used = [False]

    @property
    def num_bytes(self) -> int:
        """Nothing is held between steps."""
        return 0

    def _empty(self) -> torch.Tensor:
        param = self.params[0]
        return torch.sparse_coo_tensor(
            torch.empty(1, 0, dtype=torch.int64, device=param.device),
            torch.empty(0, *param.shape[1:], dtype=self._dtype, device=param.device),
            size=param.shape,
            is_coalesced=True,
            check_invariants=False,
        )

    def gradients(self) -> list[torch.Tensor]:
        """The gradient, sparse, each index once."""
        return [self._average]

    def stored(self) -> torch.Tensor:
        """Its rows as one vector."""
        return self._average._values().view(-1)

    def write_gradient(self, position: int, gradient: torch.Tensor, factor: float) -> None:
        """Add `factor * gradient`; a dense one is taken by its rows that are not zero."""
        if gradient.layout is torch.strided:
            gradient = gradient.to_sparse(1)
        self._local = (self._local + gradient.to(self._dtype) * factor).coalesce()
        self.used[position] = True

    def start_reduce(self) -> comm.Pending:
        """Gather everybody's rows. The number of rows is asked for first, and waited for."""
        indices, values = self._local._indices()[0], self._local._values()
        counts = torch.empty(self.group.size, dtype=torch.int64, device=indices.device)
        own = torch.tensor([indices.numel()], device=indices.device)
        caller = self.names[0]
        comm.all_gather(counts, own, self.group, caller=f"{caller} (rows)")
        rows = counts.tolist()
        most = max(rows)
        padded = values.new_zeros(most, *values.shape[1:])
        padded[: len(indices)] = values
        where = indices.new_zeros(most)
        where[: len(indices)] = indices
        all_values = padded.new_empty(self.group.size * most, *values.shape[1:])
        all_where = where.new_empty(self.group.size * most)
        comm.all_gather(all_where, where, self.group, caller=f"{caller} (indices)")
        pending = comm.all_gather(
            all_values.view(-1), padded.view(-1), self.group, caller=caller, async_op=True
        )
        if pending is None:
            raise AssertionError("an asynchronous collective returns what is pending")
        self._finish = lambda: self._add(rows, most, all_where, all_values)
        return pending

    def _add(self, rows: list[int], most: int, where: torch.Tensor, values: torch.Tensor) -> None:
        kept = [slice(rank * most, rank * most + count) for rank, count in enumerate(rows)]
        total = torch.sparse_coo_tensor(
            torch.cat([where[part] for part in kept]).unsqueeze(0),
            torch.cat([values[part] for part in kept]),
            size=self._local.shape,
            check_invariants=False,
        )
        self._average = (self._average + total).coalesce()

    _finish: Callable[[], None]

    def finish_reduce(self) -> None:
        """Add what came to the average."""
        self._finish()
        del self._finish  # it holds what came from everybody
        self._local = self._empty()

    def set_zero(self) -> None:
        """A step without any backward."""
        self._average = self._local = self._empty()

    def clear(self) -> None:
        """Forget the gradient."""
        self.set_zero()
        self.used = [False]
