"""Whether `import deepspeed` is whose the installed metadata says.

The package of the suite and the original have the same name and folder. Where files of both are
mixed and ours are imported, our package refuses at import; where the original's are imported,
nothing of ours runs in the program, so the commands of the suite look.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

_NAME = "deepspeed"
#: In the version of the suite's own package.
_LOCAL = "+ds"
#: What its `__init__.py` defines and the original's does not.
_MARK = b"__provider__"
_REPAIR = (
    f"`pip uninstall {_NAME}` until it finds none, delete what is left of the folder, install one "
    "of them, and `pip install --force-reinstall --no-deps ds-core` for the command `ds`"
)


def dropin_problems() -> list[str]:
    """What is wrong with the suite's `deepspeed`, each with what to do; empty if it is not there.

    Reads metadata and one file; imports nothing.
    """
    versions = [dist.version for dist in metadata.distributions(name=_NAME)]
    if not any(_LOCAL in version for version in versions):
        return []
    try:
        found = importlib.util.find_spec(_NAME)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None:
        return [f"{_NAME} {versions[0]} is installed, but its files are gone: {_REPAIR}"]
    if _LOCAL not in versions[0]:
        return []  # another folder of the path comes first, with a package of its own
    if _MARK in Path(found.origin).read_bytes():
        return []
    return [
        f"{_NAME} {versions[0]} of this suite is installed, but {found.origin} is the original's, "
        f"which has overwritten it: programs run on the original, and transformers and others "
        f"believe the version; {_REPAIR}"
    ]
