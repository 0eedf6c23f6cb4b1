"""How values of several ranks become one: the operations that reductions offer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ds_core.errors import CommError

_LOW_PRECISION = (torch.float16, torch.bfloat16)

# How the backend reduces, and how two tensors combine here. A mean is a sum that is divided at the
# end, because not every backend has one.
_BACKEND: dict[str, dist.ReduceOp] = {
    "sum": dist.ReduceOp(dist.ReduceOp.SUM),
    "mean": dist.ReduceOp(dist.ReduceOp.SUM),
    "max": dist.ReduceOp(dist.ReduceOp.MAX),
    "min": dist.ReduceOp(dist.ReduceOp.MIN),
    "product": dist.ReduceOp(dist.ReduceOp.PRODUCT),
    "bitwise_and": dist.ReduceOp(dist.ReduceOp.BAND),
    "bitwise_or": dist.ReduceOp(dist.ReduceOp.BOR),
    "bitwise_xor": dist.ReduceOp(dist.ReduceOp.BXOR),
}
_OF_ALL_DTYPES = frozenset({"sum", "max", "min", "product"})
_COMBINE: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
    "bitwise_and": torch.bitwise_and,
    "bitwise_or": torch.bitwise_or,
    "bitwise_xor": torch.bitwise_xor,
}


def backend_op(op: str, function: str, caller: str, dtype: torch.dtype) -> dist.ReduceOp:
    """What the backend is asked to do for `op`.

    Raises CommError for an operation that does not exist, or not for this dtype.
    """
    found = _BACKEND.get(op)
    if found is None or op not in _OF_ALL_DTYPES:
        _check(op, function, caller, dtype)
    assert found is not None
    return found


@functools.cache
def all_reduce_options(op: str) -> dist.AllreduceOptions:
    """What a backend's all-reduce takes; made once, because making it costs as much as the call."""
    options = dist.AllreduceOptions()
    options.reduceOp = _BACKEND[op]
    return options


def _check(op: str, function: str, caller: str, dtype: torch.dtype) -> None:
    where = f"{function} of {caller or 'the caller'}: op"
    if op not in _BACKEND:
        raise CommError(f"{where}: got {op!r}, expected one of {', '.join(_BACKEND)}")
    real = dtype.is_floating_point or dtype.is_complex
    if op == "mean" and not real:
        raise CommError(f"{where}: a mean of {dtype} is not an integer; use 'sum' and divide")
    if op.startswith("bitwise") and real:
        raise CommError(f"{where}: got {op!r} for {dtype}; bitwise operations need integers")


def reduce_in_rank_order(
    out: torch.Tensor,
    parts: Sequence[torch.Tensor],
    home: torch.Tensor,
    *,
    op: str = "sum",
    accumulate: bool = False,
) -> None:
    """out = [out +] parts[0] op parts[1] op ..., in fp32 where the parts are less precise.

    `home` holds the running result of parts that are fp32.
    """
    combine = _COMBINE[op]
    if parts[0].dtype in _LOW_PRECISION:
        total = parts[0].float()
        combine(total, parts[1], out=total)
    else:
        total = combine(parts[0], parts[1], out=home)
    for part in parts[2:]:
        combine(total, part, out=total)
    if op == "mean":
        total.div_(len(parts))
    if accumulate:
        out.add_(total)
    elif total.data_ptr() != out.data_ptr():
        out.copy_(total)
