"""Attention over batches and packed sequences; forward and backward.

A program of the forward holds a tile of queries and walks over the tiles of keys that they see; of
the backward one kernel walks so for dq, the other holds a tile of keys and walks over the queries
that see them, of all heads that share them. Every sum has one program and one order, so results are
the same in every run. Tiles that no row sees are left out; only those at an edge of what is seen
are masked, in a loop of their own.

The floor is that of the matrix units: a tile of 128 queries needs 4 * 128 * d operations for the
4 * d bytes of a key and value, 128 per byte, about what GPUs have of both. Source: Dao 2023,
section 3.
"""

from __future__ import annotations

from typing import Any

import torch

from ds_core.errors import OpError
from ds_core.ops import attention as op
from ds_core.ops.arguments import expect
from ds_ops.triton_kernels.attention_calls import not_taken
from ds_ops.triton_kernels.attention_programs import (
    PLAIN,
    attention_backward_keys,
    attention_backward_queries,
    attention_forward,
)
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.targets import MATRIX

#: Stands for no bound of a window.
_FAR = 1 << 30


# --- Configs --------------------------------------------------------------------------------------


def _config(m: int, n: int, d: int, warps: int, stages: int, *targets: str) -> Config:
    return Config({"M": m, "N": n, "D": d}, {"head": d}, warps, stages, targets)


_NVIDIA = ("sm_80", "sm_90", "sm_100")
_NEW = _NVIDIA[1:]
#: Of sm_80: what fits into the 99 KiB of its smaller kin. Of gfx942: four warps have twice the
#: registers that eight have. wgmma and tcgen05 need 64 rows for every four warps.
_FORWARD = (
    _config(128, 64, 64, 8, 3, "sm_80"),
    _config(128, 64, 128, 8, 2, "sm_80"),
    _config(64, 32, 256, 8, 2, "sm_80"),
    _config(128, 128, 64, 8, 3, *_NEW),
    _config(128, 128, 128, 8, 2, "sm_90"),
    _config(128, 64, 128, 8, 3, "sm_100"),
    _config(64, 64, 256, 8, 2, *_NEW),
    _config(128, 64, 64, 4, 1, "gfx942"),
    _config(128, 64, 128, 4, 1, "gfx942"),
    _config(64, 32, 256, 4, 1, "gfx942"),
)
_QUERIES = (
    _config(128, 64, 64, 8, 2, "sm_80"),
    _config(64, 64, 128, 8, 2, "sm_80"),
    _config(64, 32, 256, 8, 1, "sm_80"),
    _config(128, 64, 64, 8, 3, "sm_90"),
    _config(128, 64, 64, 4, 2, "sm_100"),
    _config(128, 64, 128, 8, 2, *_NEW),
    _config(128, 32, 256, 8, 2, *_NEW),
    _config(128, 64, 64, 4, 1, "gfx942"),
    _config(64, 64, 128, 4, 1, "gfx942"),
    _config(64, 32, 256, 4, 1, "gfx942"),
)
_KEYS = (
    _config(64, 64, 64, 8, 2, "sm_80"),
    _config(64, 64, 128, 8, 2, "sm_80"),
    _config(64, 128, 64, 8, 2, *_NEW),
    _config(32, 128, 128, 8, 2, "sm_90"),
    _config(64, 128, 128, 8, 2, "sm_100"),
    _config(64, 64, 64, 4, 1, "gfx942"),
    _config(32, 64, 128, 4, 1, "gfx942"),
)
#: Two sums of 64 keys do not fit into the registers that wgmma adds up in: 32 by mma.sync do.
_WIDE_KEYS = (
    _config(32, 32, 256, 8, 2, "sm_80", "sm_90"),
    _config(32, 64, 256, 8, 2, "sm_100"),
    _config(32, 32, 256, 4, 1, "gfx942"),
)
_TYPES = {
    "*bf16": "q k v out grad dq dk dv",
    "*fp32": "lse grad_lse delta",
    "*i32": "query_starts key_starts",
    "fp32": "scale",
    "i32": " ".join(PLAIN),
}


def _kernel(
    function: Any, configs: tuple[Config, ...], variant: str = "", sm_90: str = ""
) -> Kernel:
    """Compiled as for packed sequences and a head size that is no power of two: all of its code.

    sm_90: its instruction for products of matrices, if it is not the fastest one.
    """
    named = types(_TYPES, OF_LSE=True, PACKED=True, PADDED=True)
    named = {name: named[name] for name in function.arg_names if name in named}
    instructions = {**MATRIX, "sm_90": sm_90} if sm_90 else MATRIX
    return Kernel(function, configs, named, instructions, variant)


_OF_FORWARD = _kernel(attention_forward, _FORWARD)
_OF_QUERIES = _kernel(attention_backward_queries, _QUERIES)
_OF_KEYS = _kernel(attention_backward_keys, _KEYS)
_OF_WIDE_KEYS = _kernel(attention_backward_keys, _WIDE_KEYS, "wide", "mma.sync")
KERNELS = (_OF_FORWARD, _OF_QUERIES, _OF_KEYS, _OF_WIDE_KEYS)


# --- Launches -------------------------------------------------------------------------------------


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    max_queries: int = op.UNBOUNDED,
    max_keys: int = op.UNBOUNDED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.attention.reference`."""
    numbers = (scale, left, right, max_queries, max_keys)
    out, lse = op.fake(q, k, v, query_starts, key_starts, *numbers)
    call = _Call(q, k, v, query_starts, key_starts, *numbers)
    config = _OF_FORWARD.config(op.NAME, q.device, head=q.shape[-1])
    grid = (call.tiles(call.queries, config.constants["M"]), q.shape[-2])
    launch(
        _OF_FORWARD,
        config,
        grid,
        *(*call.tensors, out, lse, *call.arguments, *call.strides(*call.tensors)),
        **call.constants(config),
    )
    return out, lse


def attention_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    max_queries: int = op.UNBOUNDED,
    max_keys: int = op.UNBOUNDED,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.attention.backward_reference`."""
    rest = (query_starts, key_starts, scale, left, right, max_queries, max_keys)
    dq, dk, dv = op.backward_fake(grad, grad_lse, q, k, v, out, lse, *rest)
    expect_plain("attention_backward", grad_lse=grad_lse, out=out, lse=lse)
    call = _Call(q, k, v, *rest)
    grad = _near("grad", grad)
    head, strides = q.shape[-1], call.strides(grad, *call.tensors)
    delta = torch.empty_like(lse)
    config = _OF_QUERIES.config("attention_backward", q.device, head=head)
    grid = (call.tiles(call.queries, config.constants["M"]), q.shape[-2])
    launch(
        _OF_QUERIES,
        config,
        grid,
        *(grad, lse if grad_lse is None else grad_lse, *call.tensors, out, lse, dq, delta),
        *(*call.arguments, *strides),
        OF_LSE=grad_lse is not None,
        **call.constants(config),
    )
    of_keys = _OF_KEYS if head <= 128 else _OF_WIDE_KEYS
    config = of_keys.config("attention_backward", q.device, head=head)
    grid = (call.tiles(call.keys, config.constants["N"]), k.shape[-2])
    launch(
        of_keys,
        config,
        grid,
        *(grad, *call.tensors, lse, delta, dk, dv, *call.arguments, *strides),
        **call.constants(config),
    )
    return dq, dk, dv


#: Rows of the largest tile.
_TILE = 128


def _near(name: str, t: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if kernels would not find its rows where they look for them.

    That is at multiples of 8 elements, those of a tile within what 32 bits reach.
    """
    told = f"strides {list(t.stride())}"
    expect(t.stride(-1) == 1, op.NAME, name, told, "a contiguous last dimension")
    steps = zip(t.stride()[:-1], t.shape[:-1], strict=True)
    even = all(stride % 8 == 0 for stride, size in steps if size > 1)
    return t if even and t.stride(-3) * _TILE < 1 << 31 else t.contiguous()


class _Call:
    """What all kernels of a call are told."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        query_starts: torch.Tensor | None,
        key_starts: torch.Tensor | None,
        scale: float,
        left: int,
        right: int,
        max_queries: int,
        max_keys: int,
    ) -> None:
        refusal = not_taken(q)
        if refusal is not None:
            raise OpError(
                f"{op.NAME}: {refusal}; another takes it: DS_OPS_IMPL={op.NAME}=reference"
            )
        self.tensors = tuple(_near(name, t) for name, t in (("q", q), ("k", k), ("v", v)))
        if q.device.type == "cpu":  # a GPU would have to be waited for
            op.check_starts(q, k, query_starts, key_starts, max_queries, max_keys)
        self.queries, self.keys, self._head = q.shape[-3], k.shape[-3], q.shape[-1]
        self._packed = query_starts is not None
        self._sequences = len(q) if query_starts is None else len(query_starts) - 1
        unused = k if query_starts is None else query_starts
        left, right = (_FAR if side == op.UNBOUNDED else min(side, _FAR) for side in (left, right))
        self.arguments = (
            *(unused, unused if key_starts is None else key_starts, scale, left, right),
            *(self._sequences, self.queries, self.keys, q.shape[-2]),
            *(q.shape[-2] // k.shape[-2], self._head // 8),
        )

    def tiles(self, tokens: int, block: int) -> int:
        """How many programs hold the tokens of all sequences, in tiles of `block`."""
        if not self._packed:
            return self._sequences * blocks(tokens, block)
        return tokens // block + self._sequences if tokens else 0

    def constants(self, config: Config) -> dict[str, bool]:
        """How tensors lie, as the kernels' constants."""
        return {"PACKED": self._packed, "PADDED": self._head != config.constants["D"]}

    def strides(self, *tensors: torch.Tensor) -> tuple[int, ...]:
        """From one sequence of a batch, row and head to the next, of each tensor, in eights."""
        found: list[int] = []
        for t in tensors:
            steps = [stride // 8 for stride in t.stride()[:-1]]
            found += [0, *steps] if self._packed else steps
        return tuple(found)
