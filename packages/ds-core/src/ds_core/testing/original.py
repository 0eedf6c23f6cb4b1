"""Whether `import deepspeed` finds DeepSpeed itself, for what compares with it."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path


def original_deepspeed() -> str | None:
    """The version of the DeepSpeed team's package; None without it.

    This repository has a package of that name too, which is not meant here: its version has "+ds",
    and where both could be imported, the first on `sys.path` counts.
    """
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return None
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None or "+ds" in version:
        return None
    # A source tree of ours that hides what is installed has no version of its own.
    return None if Path(found.origin).with_name("_installation.py").is_file() else version
