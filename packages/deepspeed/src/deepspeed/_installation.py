"""Whether files of the original package and of this one are in the same folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator

from deepspeed._absent import ABSENT
from deepspeed._errors import MixedInstallError

_WHAT_TO_DO = (
    "uninstall both (`pip uninstall deepspeed`, repeated until it finds none; delete what is left "
    "of the folder), then install one of them; the original also brings a command `ds` of its own, "
    "so if that of ds-core is gone, `pip install --force-reinstall --no-deps ds-core`"
)


def check(package: Iterable[str]) -> None:
    """Raise MixedInstallError if parts of both packages would be imported as one.

    Costs a listing of the package's folder and of the folders of `sys.path`.

    Args:
        package: folders of this package, its `__path__`.
    """
    for folder in package:
        left = sorted(_leftovers(folder))
        if left:
            raise MixedInstallError(
                f"{folder} holds this package, deepspeed on ds-core, and beside it files of the "
                f"original DeepSpeed ({', '.join(left[:4])}{', ...' if left[4:] else ''}): "
                f"{_WHAT_TO_DO}"
            )
    for folder in dict.fromkeys(sys.path):
        versions = sorted(_versions(folder))
        if any("+ds" in version for version in versions) and len(versions) > 1:
            raise MixedInstallError(
                f"{folder} has {len(versions)} distributions called deepspeed, "
                f"{' and '.join(versions)}, whose files overwrite each other: {_WHAT_TO_DO}"
            )


def _leftovers(folder: str) -> Iterator[str]:
    """Top-level modules of the original that this package does not have."""
    for name in _listing(folder):
        if name.endswith(".py"):
            if f"deepspeed.{name[:-3]}" in ABSENT:
                yield name
        elif f"deepspeed.{name}" in ABSENT and os.path.exists(
            os.path.join(folder, name, "__init__.py")
        ):
            yield f"{name}/"


def _versions(folder: str) -> Iterator[str]:
    for name in _listing(folder):
        if name.startswith("deepspeed-") and name.endswith((".dist-info", ".egg-info")):
            yield name.removeprefix("deepspeed-").rpartition(".")[0]


def _listing(folder: str) -> list[str]:
    try:
        return os.listdir(folder or os.curdir)
    except OSError:  # not a folder: an archive, or gone
        return []
