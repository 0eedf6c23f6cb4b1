"""What `ds report` finds out about packages: what is there, what each provides, what is missing."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import get_args

import torch
from torch.torch_version import TorchVersion

from ds_core import plugins
from ds_core.errors import DsError, PluginError

#: The packages of the suite and what each is for.
SUITE: Mapping[str, str] = {
    "ds-core": "engine, config, collectives, checkpoints, launcher",
    "ds-zero": "ZeRO 1-3, offload to CPU and NVMe",
    "ds-ops": "fast kernels and optimizers, asynchronous file I/O",
    "ds-comm": "compressed optimizers and collectives",
    "ds-pipe": "pipeline, tensor and sequence parallelism",
    "ds-moe": "mixture of experts",
    "ds-inference": "serving and generation",
    "ds-compress": "quantization, pruning, distillation",
}
_NOT_FOR_USERS = ("test",)


@dataclass(frozen=True)
class Provided:
    """An entry that a package registers on a seam.

    Attributes:
        seam: such as "sharding".
        name: what it is asked for by.
        package: distribution and version.
        problem: why it cannot be used; empty if it can.
    """

    seam: str
    name: str
    package: str
    problem: str = ""


@dataclass(frozen=True)
class Installable:
    """Something that could be installed: what it is for, and the command."""

    name: str
    purpose: str
    command: str


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def place_of(distribution: str) -> str | None:
    """The folder of an installed distribution's own module, the source's if it is editable."""
    module = distribution.replace("-", "_")
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return None if found is None or found.origin is None else str(Path(found.origin).parent)


def duplicates() -> list[str]:
    """Packages of the suite, and deepspeed, of which one folder holds several versions."""
    versions: dict[tuple[str, str], set[str]] = {}
    for dist in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", dist.name or "").lower()
        if name in SUITE or name == "deepspeed":
            folder = str(dist.locate_file(""))
            versions.setdefault((name, folder), set()).add(dist.version)
    return [
        f"{folder} has {len(found)} versions of {name} ({', '.join(sorted(found))}), whose files "
        f"overwrite each other: `pip uninstall {name}` until it finds none, then install one"
        for (name, folder), found in versions.items()
        if len(found) > 1
    ]


def provided() -> list[Provided]:
    """Every entry on every seam, each loaded to see whether it can be."""
    return [row for seam in get_args(plugins.Seam) for row in _provided_on(seam)]


def _provided_on(seam: plugins.Seam) -> list[Provided]:
    try:
        entries = plugins.registered(seam)
    except PluginError as error:
        return [Provided(seam, "*", "", _one_line(error))]
    rows = []
    for name, entry in sorted(entries.items()):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        problem = ""
        try:
            plugins.load(seam, name)
        except DsError as error:
            problem = _one_line(error)
        rows.append(Provided(seam, name, package, problem))
    return rows


def installable() -> list[Installable]:
    """Packages of the suite, and extras of those that are installed, which are not there."""
    missing = [
        Installable(name, purpose, f"pip install {name}")
        for name, purpose in SUITE.items()
        if version_of(name) is None
    ]
    for name in SUITE:
        if version_of(name) is None:
            continue
        for extra, needs in _extras(name).items():
            absent = [need for need in needs if version_of(need) is None]
            if absent and extra not in _NOT_FOR_USERS:
                command = f'pip install "{name}[{extra}]"'
                missing.append(Installable(f"{name}[{extra}]", ", ".join(absent), command))
    return missing


def range_problems() -> list[str]:
    """Installed versions that an installed package of the suite does not accept."""
    problems = []
    for name in SUITE:
        for requirement in (version_of(name) and metadata.requires(name)) or ():
            if ";" in requirement:
                continue  # of an extra, or of another platform
            match = re.match(r"([\w.-]+)(.*)", requirement)
            if match is None:
                continue
            wanted, rules = match[1], match[2].strip(" ()")
            own = torch.__version__ if wanted == "torch" else version_of(wanted)
            if own is None or not _satisfies(str(own), rules):
                state = "which is not installed" if own is None else f"{own} is installed"
                problems.append(
                    f'{name} needs {wanted} {rules}, {state}: pip install "{requirement}"'
                )
    return problems


def _satisfies(version: str, rules: str) -> bool:
    """Whether a version lies in a range such as ">=0.1,<0.2" or "~=0.3.1"."""
    own = TorchVersion(version.split("+")[0])  # torch carries the comparison of PEP 440
    for rule in filter(None, (part.strip() for part in rules.split(","))):
        match = re.match(r"(>=|<=|==|!=|~=|<|>)\s*(.+)", rule)
        if match is None:
            continue
        bound = match[2]
        below = ".".join(bound.split(".")[:-1])
        holds = {
            ">=": own >= bound,
            "<=": own <= bound,
            ">": own > bound,
            "<": own < bound,
            "==": own == bound,
            "!=": own != bound,
            "~=": own >= bound and str(own).startswith(f"{below}."),
        }
        if not holds[match[1]]:
            return False
    return True


def _extras(distribution: str) -> dict[str, list[str]]:
    extras: dict[str, list[str]] = {}
    for requirement in metadata.requires(distribution) or ():
        match = re.match(r"([\w.-]+).*;.*extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if match is not None:
            extras.setdefault(match[2], []).append(match[1])
    return extras


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
