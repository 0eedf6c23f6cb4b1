"""The processor of this machine, without the library: what `ds ops report` says of it."""

from __future__ import annotations

from pathlib import Path

from ds_ops import _env
from ds_ops.native import sources

#: What csrc/common/isa.cpp asks the processor for, from the best instruction set to the least.
_NEEDS = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c"},
}


def name() -> str:
    """What the processor calls itself, or else its kind."""
    return _field("model name") or sources.machine()


def best() -> str:
    """The best instruction set of this processor among those that kernels are compiled for."""
    if sources.machine() != "x86_64":
        return "neon" if sources.machine() == "aarch64" else "baseline"
    flags = set(_field("flags").split())
    has = "baseline"
    for isa in reversed(_NEEDS):
        if not _NEEDS[isa] <= flags:
            break
        has = isa
    return has


def used() -> str:
    """The instruction set that kernels run with: the best that DS_OPS_ISA does not exclude.

    Raises BuildError if DS_OPS_ISA names none.
    """
    found, limit = best(), _env.instruction_set()
    if found not in _env.INSTRUCTION_SETS or limit is None:
        return found
    return min(found, limit, key=_env.INSTRUCTION_SETS.index)


def told() -> str:
    """The instruction set in use, and where it is not the best of the processor, why."""
    limit = _env.instruction_set()
    if used() == best():
        return best()
    return f"{used()}, by DS_OPS_ISA={limit}; the processor has {best()}"


def _field(label: str) -> str:
    """The first value of a field of /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in found if key.strip() == label), "")
