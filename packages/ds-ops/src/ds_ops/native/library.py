"""The C++ library of this process: found or built, loaded once, and bound to ops by name."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator
from functools import cache as once
from pathlib import Path

from ds_core.errors import BuildError
from ds_ops import _env
from ds_ops.native import cache, sources, toolchain
from ds_ops.native.build import build

logger = logging.getLogger(__name__)

_lock = threading.Lock()


def unavailable() -> str | None:
    """Why there is no library and none can be built here, or None. Builds nothing.

    One that should build is available, whatever comes of its build: see `Implementation`.
    """
    reason = sources.unsupported()
    if reason is not None:
        return reason
    try:
        found, compiler = find(), toolchain.find_compiler()
    except BuildError:
        return None  # said when it is built
    return toolchain.missing() if found is None and compiler is None else None


def find() -> Path | None:
    """The library that was built from these sources: the wheel's own, else one in the cache.

    Raises BuildError if it depends on the compiler, and CXX names one that does not work.
    """
    return next(_found(), None)


def _found() -> Iterator[Path]:
    digest = sources.digest()
    prebuilt = cache.built(cache.PREBUILT, digest)
    if prebuilt is not None:
        yield prebuilt
    compiler = toolchain.find_compiler()
    for folder in cache.readable():
        cached = cache.built(folder, digest, compiler.version if compiler else None)
        if cached is not None:
            yield cached


def state() -> str:
    """Either "prebuilt", "cached" or "will build".

    Raises BuildError as `find` does.
    """
    return cache.state_of(find())


def ensure() -> Path:
    """The library's path, after building it if need be.

    Raises BuildError if it cannot be built.
    """
    for found in _found():
        if cache.is_whole(found):
            return found
        logger.warning("%s is not as it was built, and is built anew", found)
    compiler = toolchain.find_compiler()
    if compiler is None:
        raise BuildError(f"the C++ kernels of ds-ops: {toolchain.missing()}")
    return build(sources.recipe(compiler), cache.root())


def load() -> ctypes.CDLL:
    """The loaded library. Raises BuildError, at every call, if it does not build or load."""
    with _lock:
        outcome = _outcome()
    if isinstance(outcome, ctypes.CDLL):
        return outcome
    raise BuildError(str(outcome)) from outcome


@once
def _outcome() -> ctypes.CDLL | BuildError:
    """What comes of loading it, once: a build that fails takes as long as one that does not."""
    try:
        _env.instruction_set()  # which the library reads by itself: refused here if it is wrong
        return _open(ensure())
    except BuildError as error:
        return error


def _open(path: Path) -> ctypes.CDLL:
    loaded = opened(path)
    loaded.ds_ops_isa.restype = ctypes.c_char_p
    logger.info("loaded the C++ kernels (%s) from %s", loaded.ds_ops_isa().decode(), path)
    return loaded


def opened(path: Path) -> ctypes.CDLL:
    """A library of kernels, loaded. Raises BuildError if it does not load."""
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f"the kernels of ds-ops do not load: {error}; they were built by "
            f"{cache.read_meta(path.parent).get('compiler', 'an unknown compiler')}; to build them "
            f"for this machine delete {path.parent} and call `ds ops build`; to do without set "
            f"DS_OPS_IMPL='*=reference'"
        ) from error
    for name in ("ds_ops_error", "ds_ops_name"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def bind(op: str, namespace: str, key: str) -> None:
    """Make the library's kernel that of `<namespace>::<op>` under a dispatch key.

    Raises BuildError if there is no library, or torch refuses the kernel.
    """
    bind_from(load(), op, namespace, key)


def bind_from(loaded: ctypes.CDLL, op: str, namespace: str, key: str) -> None:
    """As `bind`, from a library that was opened."""
    code = loaded.ds_ops_bind(op.encode(), namespace.encode(), key.encode())
    if code == 1:
        raise BuildError(f"the library has no kernel for op {op!r}")
    if code != 0:
        raise BuildError(f"torch refuses the kernel of {op!r}: {loaded.ds_ops_error().decode()}")


def isa() -> str:
    """The instruction set that kernels run with here."""
    return str(load().ds_ops_isa().decode())
