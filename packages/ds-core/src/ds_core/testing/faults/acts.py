"""Single faults, committed by the process that calls them; in a rank, by that rank alone."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


def die(signum: int = signal.SIGKILL) -> NoReturn:
    """End this process by a signal, as the kernel's out-of-memory killer would: no clean-up."""
    if signum != signal.SIGKILL:
        signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    sys.exit(f"signal {signum} does not end a process")


@contextmanager
def die_on_call(
    owner: object, name: str, *, nth: int = 1, signum: int = signal.SIGKILL
) -> Iterator[None]:
    """Kill this process just before the `nth` call (from 1) of `owner.name` inside the block.

    Example: `with die_on_call(os, "replace"): engine.save_checkpoint(folder)` crashes a save
    between writing its files and publishing them.
    """
    original: Callable[..., Any] = getattr(owner, name)
    remaining = nth

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            die(signum)
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, counted):
        yield


@contextmanager
def file_size_limit(max_bytes: int, on_limit: Literal["error", "die"] = "error") -> Iterator[None]:
    """Let no file grow beyond `max_bytes` inside the block; the kernel enforces it.

    Covers writes of native code too. The write that crosses the limit is cut there; then
    "error" makes it raise OSError (EFBIG), as a full disk does with ENOSPC, and "die" ends the
    process by SIGXFSZ: a crash at that very byte. Output of the process to files is limited
    as well, so do not print inside.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    core_soft, core_hard = resource.getrlimit(resource.RLIMIT_CORE)
    action = signal.SIG_DFL if on_limit == "die" else signal.SIG_IGN
    previous = signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, core_hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (core_soft, core_hard))
        signal.signal(signal.SIGXFSZ, previous)


def truncate(path: str | os.PathLike[str], num_bytes: int) -> None:
    """Cut `num_bytes` off the end of a file (all of it if it has fewer)."""
    os.truncate(path, max(0, Path(path).stat().st_size - num_bytes))


def flip_byte(path: str | os.PathLike[str], offset: int) -> None:
    """Invert all bits of the byte at `offset` of a file; a negative offset counts from the end."""
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        value = file.read(1)
        if not value:
            raise ValueError(f"flip_byte: {path} has no byte at offset {offset}")
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value[0] ^ 0xFF]))


def fail_open_files(word: str, *, on: Literal["read", "write"]) -> list[str]:
    """Let the kernel refuse to read or to write files that this process has open; returns which.

    From now on it answers EBADF, in native code too: their descriptors are replaced by ones that
    lack the right. Files without a name, as swap files are, are found as well. Linux.

    Args:
        word: that is in their path.
        on: what is refused.
    """
    found = []
    for number in os.listdir("/proc/self/fd"):
        link = f"/proc/self/fd/{number}"
        with contextlib.suppress(OSError):  # one that the listing itself had open is gone
            path = os.readlink(link)
            if word not in path:
                continue
            direct = fcntl.fcntl(int(number), fcntl.F_GETFL) & os.O_DIRECT
            right = os.O_WRONLY if on == "read" else os.O_RDONLY
            crippled = os.open(link, right | direct | os.O_CLOEXEC)
            os.dup2(crippled, int(number), inheritable=False)
            os.close(crippled)
            found.append(path)
    return found


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what `torch.empty` and its kin return with NaN (integers: their largest value).

    Code that reads memory before writing it then fails always instead of now and then.
    """
    with _PoisonEmpty():
        yield


class _PoisonEmpty(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY_FUNCTIONS:
            with torch.no_grad():
                result.fill_(_poison(result.dtype))
        return result


_EMPTY_FUNCTIONS = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_permuted,
        torch.empty_strided,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    }
)


def _poison(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max
