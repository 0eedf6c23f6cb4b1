"""Building the library: once per key, whoever else wants it at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from ds_core.errors import BuildError
from ds_ops import _env
from ds_ops.native import cache, sources
from ds_ops.native.toolchain import Compiler

logger = logging.getLogger(__name__)

_SHOWN_LINES = 40


def build(compiler: Compiler, folder: Path) -> Path:
    """The library in `folder`, built unless it is there and whole.

    Many processes may ask at once: the one that gets the lock builds, the others wait for it. A
    builder that dies leaves nothing that anybody would load.

    Raises BuildError with the command, the compiler's first lines and the log's path.
    """
    key = cache.key(sources.digest(), compiler.version)
    place = folder / key
    library = place / cache.LIBRARY
    try:
        with _locked(folder / f"{key}.lock"):
            if not cache.is_whole(library):
                _make(compiler, place, folder / f"{key}.log")
    except OSError as error:
        raise BuildError(
            f"the C++ kernels cannot be built in {folder}: {error}; set DS_OPS_CACHE to a folder "
            f"on a local disk with room for 200 MB"
        ) from error
    return library


def _make(compiler: Compiler, place: Path, log: Path) -> None:
    """Build beside `place`, and rename to it when all is done."""
    for left in place.parent.glob(f"{place.name}.tmp-*"):  # by a builder that was killed
        shutil.rmtree(left, ignore_errors=True)
    begin = time.perf_counter()
    # A warning, because nothing else explains why a program stands still for so long.
    logger.warning(
        "building the C++ kernels of ds-ops with %s into %s; this takes up to a minute, once",
        *(compiler.version, place),
    )
    made = Path(tempfile.mkdtemp(prefix=f"{place.name}.tmp-", dir=place.parent))
    try:
        _compile(compiler, made, log)
        seconds = time.perf_counter() - begin
        meta = {
            "sources": sources.digest(),
            "compiler": compiler.version,
            "machine": sources.machine(),
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
    logger.info("built the C++ kernels in %.0f s", seconds)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
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
                    logger.info("waiting for %s, which builds the C++ kernels", _holder(file))
                waits = True
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"waited {limit:.0f} s for the lock {path}, held by {_holder(file)}, which "
                        f"builds the C++ kernels; look at that process, or raise "
                        f"DS_OPS_BUILD_TIMEOUT"
                    ) from None
                time.sleep(0.05)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _compile(compiler: Compiler, folder: Path, log: Path) -> None:
    """Run ninja in `folder`; only the library stays."""
    (folder / "build.ninja").write_text(_plan(compiler), encoding="utf-8")
    command = [_ninja(), "-j", str(len(os.sched_getaffinity(0)))]
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
        raise BuildError(_failure(compiler, done.stdout, log))
    for path in folder.iterdir():
        if path.name != cache.LIBRARY:
            path.unlink()


def _ninja() -> str:
    try:
        import ninja
    except ImportError:
        raise BuildError(
            "the C++ kernels of ds-ops are built with ninja, which is not installed: "
            "pip install ninja"
        ) from None
    return str(Path(ninja.BIN_DIR) / "ninja")


def _plan(compiler: Compiler) -> str:
    """The text of build.ninja."""
    headers, libraries = sources.torch_folders()
    # Quoted for the shell, with ninja's own signs escaped.
    command, csrc, include, lib = (
        text.replace("$", "$$")
        for text in (
            str(compiler),
            *(shlex.quote(str(p)) for p in (sources.CSRC, headers, libraries)),
        )
    )
    compile_ = f"{command} $flags -I{csrc} -isystem {include}"
    compile_ += f" -ffile-prefix-map={csrc}=ds_ops -MD -MF $out.d -c $in -o $out"
    flags = " ".join(sources.link_flags())
    lines = [
        f"rule compile\n  command = {compile_}\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {command} $in -o $out {flags} -L{lib} -ltorch_cpu",
    ]
    units = sources.units()
    for unit in units:
        source = re.sub(r"([$: ])", r"$\1", str(sources.CSRC / unit.source))
        lines.append(f"build {unit.object}: compile {source}\n  flags = {' '.join(unit.flags)}")
    lines.append(f"build {cache.LIBRARY}: link {' '.join(unit.object for unit in units)}")
    return "\n".join(lines) + "\n"


def _failure(compiler: Compiler, output: str, log: Path) -> str:
    lines = output.splitlines()
    failed = [index for index, line in enumerate(lines) if line.startswith("FAILED:")]
    shown = lines[failed[0] if failed else 0 :][:_SHOWN_LINES]
    return (
        f"the C++ kernels did not build with {compiler.version} ({compiler}):\n"
        + "\n".join(f"    {line}" for line in shown)
        + f"\n  whole output: {log}\n  what to do: mend what it names, or set CXX to another "
        f"compiler (g++ >= 11 or clang++ >= 14), or do without by DS_OPS_IMPL='*=reference'"
    )
