"""Discovery of what installed packages add to the seams of ds-core.

Each seam is one entry-point group, `ds_core.<seam>`. Installing a distribution makes its
entries available; nothing is imported until an entry is asked for by name.
"""

from __future__ import annotations

import functools
import sys
from importlib import metadata
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any, Literal

from ds_core.errors import PluginError

Seam = Literal[
    "sharding",
    "runners",
    "transports",
    "ops",
    "op_tools",
    "observers",
    "config",
    "accelerators",
    "commands",
    "planners",
    "launchers",
    "optimizers",
    "tensor_files",
]

#: Where a name that nobody registered could come from: what users are told to install.
KNOWN_PROVIDERS: dict[Seam, dict[str, str]] = {
    "config": {
        "zero_optimization": "ds-zero",
        "aio": "ds-ops",
        "compression_training": "ds-compress",
        "tensor_parallel": "ds-pipe",
        "pipeline": "ds-pipe",
        "expert_parallel": "ds-moe",
        "hybrid_engine": "ds-inference",
    },
    "sharding": {"zero_optimization": "ds-zero"},
    "optimizers": dict.fromkeys(
        (
            *("adam8bit", "cpuadagrad", "cpuadam", "cpulion", "fusedadagrad", "fusedadam"),
            *("fusedlamb", "fusedlion", "fusedsgd"),
        ),
        "ds-ops",
    ),
    "ops": {"ds_ops": "ds-ops"},
    "op_tools": {"ds_ops": "ds-ops"},
    "tensor_files": {"ds_ops": "ds-ops"},
}


def entry_points(*, group: str) -> EntryPoints:
    """Entries of one group, unloaded.

    Every file of metadata is read for that, so it is done once: what is installed stays the same
    while a program runs, unless it changes where it looks for packages.
    """
    found: EntryPoints = _all_entries(tuple(sys.path)).select(group=group)
    return found


@functools.lru_cache(maxsize=2)
def _all_entries(search_path: tuple[str, ...]) -> Any:
    """All of them, in what the standard library has for it: its class differs by version."""
    return metadata.entry_points()


def registered(seam: Seam) -> dict[str, EntryPoint]:
    """Entries of one seam by name, unloaded.

    Raises PluginError if two distributions register the same name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=f"ds_core.{seam}"):
        other = found.get(entry.name)
        if other is not None and other.value != entry.value:
            raise PluginError(
                f"ds_core.{seam}: both {_distribution(other)} ({other.value}) and "
                f"{_distribution(entry)} ({entry.value}) register {entry.name!r}; uninstall one "
                f"of them"
            )
        found[entry.name] = entry
    return found


def load(seam: Seam, name: str) -> Any:
    """The object that an installed package registered under `name`.

    Raises PluginError if nobody did (saying which package would), or if its import fails.
    """
    entries = registered(seam)
    if name not in entries:
        package = KNOWN_PROVIDERS.get(seam, {}).get(name)
        remedy = f"pip install {package}" if package else f"registered: {sorted(entries) or 'none'}"
        raise PluginError(f"ds_core.{seam}: nothing installed provides {name!r} ({remedy})")
    try:
        return entries[name].load()
    except Exception as error:
        raise PluginError(
            f"ds_core.{seam}: {name!r} of {_distribution(entries[name])} "
            f"({entries[name].value}) does not load: {error}"
        ) from error


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unnamed distribution"
