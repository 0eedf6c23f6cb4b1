"""Where built libraries are kept: one folder per key, which appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from ds_core.errors import BuildError
from ds_ops import _env

logger = logging.getLogger(__name__)

LIBRARY = "libds_ops.so"
META = "meta.json"
#: Libraries that came in the wheel, one folder each.
PREBUILT = Path(__file__).resolve().parent.parent / "_lib"


def root() -> Path:
    """The folder of all built libraries, which exists and can be written.

    DS_OPS_CACHE, else the user's cache folder, else, where that cannot be written, one of the
    user's own in the folder for temporary files.

    Raises BuildError if DS_OPS_CACHE cannot be written, or no folder can.
    """
    return _root(_env.cache_folder(), _env.default_cache_folder())


def readable() -> list[Path]:
    """The folders in which libraries may lie, written or not: a shared one may be read-only."""
    given = _env.cache_folder()
    if given is not None:
        return [given]
    other = _temporary()
    return [_env.default_cache_folder(), *([other] if _is_private(other) else [])]


@cache
def _root(given: Path | None, usual: Path) -> Path:
    if given is not None:
        problem = _unwritable(given)
        if problem:
            raise BuildError(f"DS_OPS_CACHE={given}: {problem}; name a folder that can be written")
        return given
    problem = _unwritable(usual)
    if not problem:
        return usual
    other = _temporary()
    if _unwritable(other) or not _is_private(other):
        raise BuildError(
            f"no folder for built libraries: {usual}: {problem}; {other}: cannot be written, or "
            f"is another user's; set DS_OPS_CACHE to a folder that can be written"
        )
    logger.warning(
        "%s: %s; built libraries are kept in %s, until that is cleared (DS_OPS_CACHE names a "
        "better place)",
        *(usual, problem, other),
    )
    return other


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"ds_ops-{os.getuid()}"


def _unwritable(folder: Path) -> str | None:
    """Why nothing can be written there, or None; makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return error.strerror or str(error)
    return None


def _is_private(folder: Path) -> bool:
    """Whether only this user can write there: another user's library would run as us."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and found.st_mode & 0o022 == 0


def key(sources: str, compiler: str) -> str:
    """The name of the folder of what is built from these sources with that compiler."""
    return hashlib.sha256(f"{sources} {compiler}".encode()).hexdigest()[:20]


def built(folder: Path, sources: str, compiler: str | None = None) -> Path | None:
    """The library in `folder` that was built from these sources, or None.

    Args:
        folder: holds one folder per library.
        sources: their digest.
        compiler: with which it was built; None: with any.
    """
    if compiler is not None:
        entries = [folder / key(sources, compiler)]
    else:
        try:
            entries = sorted(entry for entry in folder.iterdir() if "." not in entry.name)
        except OSError:
            return None
    for entry in entries:
        library, meta = entry / LIBRARY, read_meta(entry)
        try:
            if meta.get("sources") == sources and library.stat().st_size == meta.get("bytes"):
                return library
        except OSError:
            continue
    return None


def state_of(library: Path | None) -> str:
    """Of a library that was looked for: "prebuilt", "cached" or "will build"."""
    if library is None:
        return "will build"
    return "prebuilt" if PREBUILT in library.parents else "cached"


def is_whole(library: Path) -> bool:
    """Whether a library is what its builder wrote, to the last byte.

    To load one that is not may end the process.
    """
    try:
        return read_meta(library.parent).get("sha256") == digest_of(library)
    except OSError:
        return False


def digest_of(file: Path) -> str:
    """The SHA-256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """What is known of a built library; empty if the folder holds none."""
    try:
        found = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
