"""A wheel that holds a built library is for its platform; one that does not is for all.

`ds ops build --into-package` puts the library into src/ds_ops/_lib. It needs no Python's ABI, and
torch's stable one only, so one wheel per kind of machine serves every Python and torch.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILT = "src/ds_ops/_lib"


class PlatformHook(BuildHookInterface):
    """Names the wheel after what is in it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the wheel is made."""
        # An editable installation uses the sources as they are.
        if version == "editable" or not any(Path(self.root, BUILT).glob("*/libds_ops.so")):
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
