"""Every environment variable that ds-ops reads; nothing else reads one.

DS_OPS_CACHE       where built libraries are kept; default: ds_ops in $XDG_CACHE_HOME or ~/.cache.
CXX                the C++ compiler, with options if need be ("ccache g++"); default: the first of
    c++, g++, clang++ on PATH.
CUDA_HOME          the CUDA toolkit whose nvcc builds kernels in CUDA C++; default: that of this
    Python's packages, else the nvcc on PATH.
DS_OPS_SANITIZE    address: build with AddressSanitizer, for tests.
DS_OPS_BUILD_TIMEOUT   seconds to wait for another process that builds the same library; 600.

DS_OPS_ISA         baseline, avx2 or avx512: the best instruction set to use; the library reads it
    when it is loaded. Default: the best that the processor has.

TRITON_INTERPRET   1, Triton's own: kernels in Triton run in its interpreter, on CPU tensors, for
    tests.
TRITON_DEFAULT_FP_FUSION   Triton's own: whether a * b + c is one operation. Where torch.compile
    launches our kernels, in processes of its own, nothing else says so: it becomes 1 if it is not
    set, as for kernels that are launched by ds-ops.

Which implementation computes an op is said to ds-core: DS_OPS_IMPL and DS_OPS_FALLBACK.
"""

from __future__ import annotations

import os
from pathlib import Path

from ds_core.errors import BuildError

#: From the least to the best, on x86_64.
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def cache_folder() -> Path | None:
    """The folder that DS_OPS_CACHE names."""
    given = os.environ.get("DS_OPS_CACHE")
    return Path(given).expanduser() if given else None


def default_cache_folder() -> Path:
    """Where a user's caches are."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ds_ops"


def compiler() -> str | None:
    """The compiler that CXX names."""
    return os.environ.get("CXX") or None


def cuda_home() -> str | None:
    """The toolkit that CUDA_HOME names."""
    return os.environ.get("CUDA_HOME") or None


def search_path() -> str:
    """Where programs are looked for."""
    return os.environ.get("PATH", "")


def instruction_set() -> str | None:
    """The instruction set that DS_OPS_ISA names. Raises BuildError for one that does not exist."""
    chosen = os.environ.get("DS_OPS_ISA") or None
    if chosen not in (None, *INSTRUCTION_SETS):
        raise BuildError(
            f"DS_OPS_ISA={chosen!r} in the environment: expected {', '.join(INSTRUCTION_SETS)}"
        )
    return chosen


def sanitizer() -> str | None:
    """The sanitizer to build with."""
    chosen = os.environ.get("DS_OPS_SANITIZE") or None
    if chosen not in (None, "address"):
        raise BuildError(f"DS_OPS_SANITIZE={chosen!r} in the environment: expected address")
    return chosen


def build_timeout_s() -> float:
    """Seconds to wait for a build by another process."""
    text = os.environ.get("DS_OPS_BUILD_TIMEOUT", "600")
    try:
        return float(text)
    except ValueError:
        raise BuildError(
            f"DS_OPS_BUILD_TIMEOUT={text!r} in the environment: expected seconds"
        ) from None


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, as TRITON_INTERPRET says."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def keep_fp_fusion() -> None:
    """Have Triton compute a * b + c in one operation, here and in processes that start from here.

    Otherwise this depends on Triton's version: 3.10 changes what it does by itself.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
