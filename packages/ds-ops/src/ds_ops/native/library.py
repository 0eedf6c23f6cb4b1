"""The C++ library of this process: found or built, loaded once, and bound to ops by name."""

from __future__ import annotations

import ctypes
import logging
import threading
from functools import cache as once
from pathlib import Path

from ds_core.errors import BuildError
from ds_ops.native import cache, sources, toolchain
from ds_ops.native.build import build

logger = logging.getLogger(__name__)

_lock = threading.Lock()


def unavailable() -> str | None:
    """Why there is no library and none can be built, or None."""
    reason = sources.unsupported()
    if reason is not None or find() is not None:
        return reason
    return toolchain.missing() if toolchain.find_compiler() is None else None


def find() -> Path | None:
    """The library that was built from these sources: the wheel's own, else one in the cache."""
    prebuilt = cache.find_built(cache.PREBUILT, sources.digest(), None)
    if prebuilt is not None:
        return prebuilt
    compiler = toolchain.find_compiler()
    version = compiler.version if compiler else None
    return cache.find_built(cache.root(), sources.digest(), version)


def state() -> str:
    """Either "prebuilt", "cached" or "will build"."""
    found = find()
    if found is None:
        return "will build"
    return "prebuilt" if cache.PREBUILT in found.parents else "cached"


def ensure() -> Path:
    """The library's path, after building it if need be.

    Raises BuildError if it cannot be built.
    """
    found = find()
    if found is not None:
        return found
    compiler = toolchain.find_compiler()
    if compiler is None:
        raise BuildError(f"the C++ kernels of ds-ops: {toolchain.missing()}")
    return build(compiler, cache.root())


@once
def load() -> ctypes.CDLL:
    """The loaded library. Raises BuildError if it does not build or load."""
    with _lock:
        path = ensure()
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(
                f"{path} does not load: {error}; delete its folder to build it anew"
            ) from error
        for name in ("ds_ops_error", "ds_ops_name", "ds_ops_isa"):
            getattr(loaded, name).restype = ctypes.c_char_p
        logger.info("loaded the C++ kernels (%s) from %s", loaded.ds_ops_isa().decode(), path)
        return loaded


def bind(op: str, namespace: str, key: str) -> None:
    """Make the library's kernel that of `<namespace>::<op>` under a dispatch key."""
    loaded = load()
    code = loaded.ds_ops_bind(op.encode(), namespace.encode(), key.encode())
    if code == 1:
        raise BuildError(f"the C++ library has no kernel for op {op!r}")
    if code != 0:
        raise BuildError(f"torch refuses the kernel of {op!r}: {loaded.ds_ops_error().decode()}")


def isa() -> str:
    """The instruction set that kernels run with here."""
    return str(load().ds_ops_isa().decode())
