"""Where built libraries are kept: one folder per key, which appears whole or not at all."""

from __future__ import annotations

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

LIBRARY = "libds_ops_cpu.so"
META = "meta.json"
#: Libraries that came in the wheel, one folder each.
PREBUILT = Path(__file__).resolve().parent.parent / "_lib"


@cache
def root() -> Path:
    """The folder of all built libraries, which exists and can be written.

    DS_OPS_CACHE, else the user's cache folder, else, where that cannot be written, one of the
    user's own in the folder for temporary files.

    Raises BuildError if DS_OPS_CACHE cannot be written, or no folder can.
    """
    given = _env.cache_folder()
    if given is not None:
        problem = _unwritable(given)
        if problem:
            raise BuildError(f"DS_OPS_CACHE={given}: {problem}; name a folder that can be written")
        return given
    usual = _env.default_cache_folder()
    problem = _unwritable(usual)
    if not problem:
        return usual
    other = Path(tempfile.gettempdir()) / f"ds_ops-{os.getuid()}"
    if _unwritable(other, private=True):
        raise BuildError(
            f"no folder for built libraries: {usual}: {problem}; {other}: cannot be written, or "
            f"is another user's; set DS_OPS_CACHE to a folder that can be written"
        )
    logger.warning("%s: %s; built libraries are kept in %s", usual, problem, other)
    return other


def _unwritable(folder: Path, private: bool = False) -> str | None:
    """Why nothing can be written there, or None; makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return error.strerror or str(error)
    # Another user's library would run as us.
    if private and (folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022):
        return "another user can write there"
    return None


def find_built(folder: Path, sources: str, compiler: str | None) -> Path | None:
    """The library in `folder` that was built from these sources, or None.

    Args:
        folder: holds one folder per library.
        sources: their digest.
        compiler: with which it was built; None: with any.
    """
    if not folder.is_dir():
        return None
    for entry in sorted(folder.iterdir()):
        meta = read_meta(entry)
        if meta.get("sources") != sources or not (entry / LIBRARY).is_file():
            continue
        if compiler is None or meta.get("compiler") == compiler:
            return entry / LIBRARY
    return None


def read_meta(folder: Path) -> dict[str, Any]:
    """What is known of a built library; empty if the folder holds none."""
    try:
        found = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
