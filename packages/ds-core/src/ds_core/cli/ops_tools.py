"""What installed packages of ops offer to `ds ops`: building, facts, benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from ds_core import plugins
from ds_core.errors import OpError
from ds_core.seams import OpTools


def installed() -> list[OpTools]:
    """The tools of every package that has some."""
    return [plugins.load("op_tools", name)() for name in sorted(plugins.registered("op_tools"))]


def tools() -> list[OpTools]:
    """As `installed`. Raises OpError if there are none."""
    found = installed()
    if not found:
        raise OpError("no package with implementations of ops is installed: pip install ds-ops")
    return found


def tools_for(families: Sequence[str]) -> list[tuple[OpTools, list[str]]]:
    """Who measures these families of benchmarks; all, if none is named.

    Raises OpError for a family that nobody has, or that cannot be measured here.
    """
    offered = [(tool, list(tool.benchmarks())) for tool in tools()]
    known = [family for _, own in offered for family in own]
    why_not = {family: why for tool, _ in offered for family, why in tool.unmeasured().items()}
    for family in families:
        if family not in known and family in why_not:
            raise OpError(f"ds ops bench {family}: {why_not[family]}")
        if family not in known:
            raise OpError(f"ds ops bench: no family {family!r}; there are {', '.join(known)}")
    chosen = [
        (tool, [family for family in own if not families or family in families])
        for tool, own in offered
    ]
    return [(tool, own) for tool, own in chosen if own]


def version() -> str:
    """Changes with what the installed implementations are made from."""
    return "+".join(tool.version() for tool in installed())
