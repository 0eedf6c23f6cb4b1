"""What this machine has seen of a kernel's present source without a GPU, for `ds ops report`.

An empty file in the cache of ds-ops says one thing of one source: that the tests of an op passed in
Triton's interpreter, or that all kernels of a file compile for a target and fit it.
"""

from __future__ import annotations

from ds_ops.native import cache
from ds_ops.triton_kernels import catalog
from ds_ops.triton_kernels.targets import TARGETS

_INTERPRETED = "interpreted"


def mark_interpreted(op: str) -> None:
    """Keep that an op's kernel computes what the reference does, in the interpreter."""
    _mark(op, catalog.module(op), _INTERPRETED)


def mark_compiled(module: str, target: str) -> None:
    """Keep that every kernel of a file compiles for a target and fits it."""
    _mark(module, module, target)


def seen(op: str) -> tuple[str, ...]:
    """What is known of the present source of an op's kernel: "interpreted", "fits sm_90"."""
    module = catalog.module(op)
    found = [_INTERPRETED] if _is_marked(op, module, _INTERPRETED) else []
    return (*found, *(f"fits {name}" for name in TARGETS if _is_marked(module, module, name)))


def _mark(subject: str, module: str, what: str) -> None:
    folder = cache.root() / "triton" / "checked"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _name(subject, module, what)).touch()


def _is_marked(subject: str, module: str, what: str) -> bool:
    name = _name(subject, module, what)
    return any((folder / "triton" / "checked" / name).exists() for folder in cache.readable())


def _name(subject: str, module: str, what: str) -> str:
    return f"{subject}.{catalog.digest(module)}.{what}"
