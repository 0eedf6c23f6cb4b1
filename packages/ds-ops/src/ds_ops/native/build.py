"""Building the library: once per key, whoever else wants it at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ds_core.errors import BuildError
from ds_ops import _env
from ds_ops.native import cache, sources
from ds_ops.native.toolchain import Compiler

logger = logging.getLogger(__name__)

_SHOWN_LINES = 40


def build(compiler: Compiler, folder: Path) -> Path:
    """The library in `folder`, built unless it is there.

    Many processes may ask at once: the one that gets the lock builds, the others wait for it. A
    builder that dies leaves nothing that anybody would load.

    Raises BuildError with the command, the compiler's first lines and the log's path.
    """
    key = _key(compiler)
    place = folder / key
    library = place / cache.LIBRARY
    if library.is_file():
        return library
    with _locked(folder / f"{key}.lock"):
        if library.is_file():
            return library
        for left in folder.glob(f"{key}.tmp-*"):  # by a builder that was killed
            shutil.rmtree(left, ignore_errors=True)
        begin = time.perf_counter()
        logger.info("building the C++ kernels with %s into %s", compiler.version, place)
        made = Path(tempfile.mkdtemp(prefix=f"{key}.tmp-", dir=folder))
        _compile(compiler, made, folder / f"{key}.log")
        seconds = time.perf_counter() - begin
        meta = {
            "sources": sources.digest(),
            "compiler": compiler.version,
            "machine": sources.machine(),
            "torch": torch.__version__,
            "seconds": round(seconds, 1),
        }
        (made / cache.META).write_text(json.dumps(meta, indent=2), encoding="utf-8")
        made.chmod(0o755)
        os.rename(made, place)  # on the same file system, so at once
        logger.info("built the C++ kernels in %.0f s", seconds)
    return library


def _key(compiler: Compiler) -> str:
    return hashlib.sha256(f"{sources.digest()} {compiler.version}".encode()).hexdigest()[:20]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    limit = _env.build_timeout_s()
    with open(path, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + limit
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise BuildError(
                        f"waited {limit:.0f} s for the lock {path}, held by "
                        f"{file.read().strip() or 'an unknown process'}, which builds the C++ "
                        f"kernels; look at that process, or raise DS_OPS_BUILD_TIMEOUT"
                    ) from None
                time.sleep(0.05)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _compile(compiler: Compiler, folder: Path, log: Path) -> None:
    """Run ninja in `folder`; the objects do not stay."""
    import ninja

    (folder / "build.ninja").write_text(_plan(compiler), encoding="utf-8")
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-j", str(len(os.sched_getaffinity(0)))]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log.write_text(done.stdout, encoding="utf-8")
    if done.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        raise BuildError(_failure(compiler, done.stdout, log))
    for path in folder.iterdir():
        if path.name != cache.LIBRARY:
            path.unlink()


def _plan(compiler: Compiler) -> str:
    """The text of build.ninja."""
    include, lib = sources.torch_folders()
    compile_ = f"{compiler.command} $flags -I{sources.CSRC} -isystem {include}"
    compile_ += f" -ffile-prefix-map={sources.CSRC}=ds_ops -MD -MF $out.d -c $in -o $out"
    flags = " ".join(sources.link_flags())
    lines = [
        f"rule compile\n  command = {compile_}\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler.command} $in -o $out {flags} -L{lib} -ltorch_cpu",
    ]
    units = sources.units()
    for unit in units:
        source = sources.CSRC / unit.source
        lines.append(f"build {unit.object}: compile {source}\n  flags = {' '.join(unit.flags)}")
    lines.append(f"build {cache.LIBRARY}: link {' '.join(unit.object for unit in units)}")
    return "\n".join(lines) + "\n"


def _failure(compiler: Compiler, output: str, log: Path) -> str:
    lines = output.splitlines()
    failed = [index for index, line in enumerate(lines) if line.startswith("FAILED:")]
    shown = lines[failed[0] if failed else 0 :][:_SHOWN_LINES]
    return (
        f"the C++ kernels did not build with {compiler.version} ({compiler.command}):\n"
        + "\n".join(f"    {line}" for line in shown)
        + f"\n  whole output: {log}\n  what to do: mend what it names, or set CXX to another "
        f"compiler (g++ >= 11 or clang++ >= 14), or do without with DS_OPS_IMPL=*=reference"
    )
