"""Whether an implementation computes what the reference does: one measure for all ops.

Used by the test kit (`ds_core.testing.contracts.OpContract`) and by `ds ops check`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_core.ops.arguments import FLOATS
from ds_core.ops.tolerance import BESIDE_TORCH, EXACT
from ds_core.seams.op import Op


@dataclass(frozen=True)
class Finding:
    """How one call compared.

    Attributes:
        error: the largest ||d|| / ||truth|| of its results.
        problem: what is wrong, empty if nothing is.
    """

    error: float
    problem: str = ""


def compare(op: Op, compute: Callable[..., Any], args: Sequence[Any]) -> Finding:
    """Compute `op` on copies of `args`, and compare every result with the reference in float64.

    Results are what it returns and the arguments that its schema says it writes. Memory that
    torch hands out meanwhile is filled with NaN, so that a result that is not written shows. Of a
    random op only shapes, dtypes and devices are compared.
    """
    mine, plain, true = (_copies(args) for _ in range(3))
    true = [_widened(value) for value in true]
    with filled_with_nan():
        got = _results(op, compute(*mine), mine)
    own = _results(op, op.reference(*plain), plain)
    # Moved bytes have no truth beside the reference's.
    truth = own if op.tolerance is EXACT else _results(op, op.reference(*true), true)
    problem = _changed(op, mine, args)
    worst = 0.0
    for index, (result, beside, right) in enumerate(zip(got, own, truth, strict=True)):
        error, told = _distance(op, result, beside, right)
        worst = max(worst, error)
        if told and not problem:
            problem = f"result {index}: {told}"
    return Finding(worst, problem)


def written(op: Op) -> list[int]:
    """Positions of the arguments that an op writes, as its schema says."""
    schema = torch._C.parse_schema(op.name + op.schema)
    return [
        index
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


@contextlib.contextmanager
def filled_with_nan() -> Iterator[None]:
    """Memory that torch allocates in the block, also in C++, holds NaN until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _distance(
    op: Op, result: torch.Tensor, beside: torch.Tensor, truth: torch.Tensor
) -> tuple[float, str]:
    if (result.dtype, result.device, result.shape) != (beside.dtype, beside.device, beside.shape):
        return float("inf"), (
            f"got {result.dtype} {list(result.shape)} on {result.device}, expected "
            f"{beside.dtype} {list(beside.shape)} on {beside.device}"
        )
    if result.numel() == 0 or not op.measured:
        return 0.0, ""
    if not result.is_floating_point():
        same = torch.equal(result, beside)
        return (0.0, "") if same else (float("inf"), "differs from the reference")
    error, torchs = relative(result, truth), relative(beside, truth)
    allowed = max(op.tolerance[result.dtype], BESIDE_TORCH * torchs)
    # Written so that a NaN fails.
    if error <= allowed:
        return error, ""
    return error, f"off by {error:.2e}, allowed {allowed:.2e} (torch itself: {torchs:.2e})"


def relative(result: torch.Tensor, truth: torch.Tensor) -> float:
    """||result - truth|| / ||truth||; where both are infinite or NaN alike counts as equal."""
    a, b = result.double(), truth.double()
    same = (a == b) | (a.isnan() & b.isnan())
    distance = float(torch.where(same, 0.0, a - b).norm())
    size = float(torch.where(b.isfinite(), b, 0.0).norm())
    return distance / size if size else distance


def _results(op: Op, returned: Any, args: Sequence[Any]) -> list[torch.Tensor]:
    flat = [returned, *(args[index] for index in written(op))]
    return [t for value in flat for t in _tensors(value)]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    return []


def _changed(op: Op, after: Sequence[Any], before: Sequence[Any]) -> str:
    for index in set(range(len(before))) - set(written(op)):
        for new, old in zip(_tensors(after[index]), _tensors(before[index]), strict=True):
            if not torch.equal(comparable(new), comparable(old)):
                return f"argument {index} was changed, which the schema does not say"
    return ""


def comparable(t: torch.Tensor) -> torch.Tensor:
    """Equal tensors for equal ones, also where there is NaN."""
    if t.is_floating_point() and t.dtype.itemsize == 1:
        return t.view(torch.uint8)  # torch computes nothing in fp8
    return t.nan_to_num()


def _copies(args: Sequence[Any]) -> list[Any]:
    return [_copy(value) for value in args]


def _copy(value: Any) -> Any:
    """With storage of its own, but as far from an aligned address as the original."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage().clone()
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        return empty.set_(storage, value.storage_offset(), value.shape, value.stride())
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in FLOATS else value
    if isinstance(value, list | tuple):
        return type(value)(_widened(item) for item in value)
    return value
