"""How values of several ranks become one: torch's own type, in the words of ds_core.comm."""

from __future__ import annotations

from torch.distributed import ReduceOp

from ds_core.errors import CommError

_NAMES = {
    "SUM": "sum",
    "AVG": "mean",
    "PRODUCT": "product",
    "MIN": "min",
    "MAX": "max",
    "BAND": "bitwise_and",
    "BOR": "bitwise_or",
    "BXOR": "bitwise_xor",
}
_KNOWN = {getattr(ReduceOp, name): told for name, told in _NAMES.items()}


def name_of(op: object) -> str:
    """What ds_core.comm calls a reduction. Raises CommError for one that it does not have."""
    # A ReduceOp made from one of its constants equals it, and does not hash.
    for known, told in _KNOWN.items():
        if op == known:
            return told
    raise CommError(f"op: got {op!r}, expected one of ReduceOp.{', ReduceOp.'.join(_NAMES)}")


__all__ = ["ReduceOp", "name_of"]
