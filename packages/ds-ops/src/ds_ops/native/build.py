"""Building the library: once per key, whoever else wants it at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from ds_core.errors import BuildError
from ds_ops import _env
from ds_ops.native import cache

logger = logging.getLogger(__name__)

_SHOWN_LINES = 40


@dataclass(frozen=True)
class Recipe:
    """What a library is built from, and how.

    Attributes:
        what: its kernels, in a message: "the C++ kernels".
        sources: a digest of sources and flags; with `tool`, the name of what is built.
        tool: the compiler's version.
        command: the compiler, as a message has it.
        plan: the text of build.ninja, whose product is `cache.LIBRARY`.
        remedy: what to do if it does not build.
    """

    what: str
    sources: str
    tool: str
    command: str
    plan: str
    remedy: str


def build(recipe: Recipe, folder: Path) -> Path:
    """The library in `folder`, built unless it is there and whole.

    Many processes may ask at once: the one that gets the lock builds, the others wait for it. A
    builder that dies leaves nothing that anybody would load.

    Raises BuildError with the command, the compiler's first lines and the log's path.
    """
    key = cache.key(recipe.sources, recipe.tool)
    place = folder / key
    library = place / cache.LIBRARY
    try:
        with _locked(folder / f"{key}.lock", recipe.what):
            if not cache.is_whole(library):
                _make(recipe, place, folder / f"{key}.log")
    except OSError as error:
        raise BuildError(
            f"{recipe.what} cannot be built in {folder}: {error}; set DS_OPS_CACHE to a folder "
            f"on a local disk with room for 200 MB"
        ) from error
    return library


def _make(recipe: Recipe, place: Path, log: Path) -> None:
    """Build beside `place`, and rename to it when all is done."""
    for left in place.parent.glob(f"{place.name}.tmp-*"):  # by a builder that was killed
        shutil.rmtree(left, ignore_errors=True)
    begin = time.perf_counter()
    # A warning, because nothing else explains why a program stands still for so long.
    logger.warning(
        "building %s of ds-ops with %s into %s; this takes up to a minute, once",
        *(recipe.what, recipe.tool, place),
    )
    made = Path(tempfile.mkdtemp(prefix=f"{place.name}.tmp-", dir=place.parent))
    try:
        _compile(recipe, made, log)
        seconds = time.perf_counter() - begin
        meta = {
            "sources": recipe.sources,
            "compiler": recipe.tool,
            "machine": platform.machine(),
            "torch": torch.__version__,
            "seconds": round(seconds, 1),
            "bytes": (made / cache.LIBRARY).stat().st_size,
            "sha256": cache.digest_of(made / cache.LIBRARY),
        }
        (made / cache.META).write_text(json.dumps(meta, indent=2), encoding="utf-8")
        made.chmod(0o755)
        if place.exists():  # one that is not whole; whoever has it loaded keeps it
            os.rename(place, made.with_name(f"{place.name}.tmp-damaged"))
        os.rename(made, place)  # on the same file system, so at once
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(made.with_name(f"{place.name}.tmp-damaged"), ignore_errors=True)
    logger.info("built %s in %.0f s", recipe.what, seconds)


@contextlib.contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    limit = _env.build_timeout_s()
    with open(path, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + limit
        waits = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waits:
                    logger.info("waiting for %s, which builds %s", _holder(file), what)
                waits = True
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"waited {limit:.0f} s for the lock {path}, held by {_holder(file)}, which "
                        f"builds {what}; look at that process, or raise DS_OPS_BUILD_TIMEOUT"
                    ) from None
                time.sleep(0.05)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _compile(recipe: Recipe, folder: Path, log: Path) -> None:
    """Run ninja in `folder`; only the library stays."""
    (folder / "build.ninja").write_text(recipe.plan, encoding="utf-8")
    command = [_ninja(recipe.what), "-j", str(len(os.sched_getaffinity(0)))]
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    log.write_text(done.stdout, encoding="utf-8")
    if done.returncode != 0:
        raise BuildError(_failure(recipe, done.stdout, log))
    for path in folder.iterdir():
        if path.name != cache.LIBRARY:
            path.unlink()


def _ninja(what: str) -> str:
    try:
        import ninja
    except ImportError:
        raise BuildError(
            f"{what} of ds-ops are built with ninja, which is not installed: pip install ninja"
        ) from None
    return str(Path(ninja.BIN_DIR) / "ninja")


def _failure(recipe: Recipe, output: str, log: Path) -> str:
    lines = output.splitlines()
    failed = [index for index, line in enumerate(lines) if line.startswith("FAILED:")]
    shown = lines[failed[0] if failed else 0 :][:_SHOWN_LINES]
    return (
        f"{recipe.what} did not build with {recipe.tool} ({recipe.command}):\n"
        + "\n".join(f"    {line}" for line in shown)
        + f"\n  whole output: {log}\n  what to do: {recipe.remedy}"
    )
