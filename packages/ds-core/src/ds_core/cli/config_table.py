"""How `ds config` shows keys and values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ds_core.cli.tables import table

if TYPE_CHECKING:
    from ds_core.config import Row
    from ds_core.config.reference import Key


def render(rows: Sequence[Row], *, with_meanings: bool) -> str:
    """The rows as a table of key, value and origin, and on request what each key means."""
    header = ("key", "value", "origin", "meaning")
    body = [(row.key, json.dumps(row.value), row.origin, row.meaning) for row in rows]
    width = len(header) if with_meanings else len(header) - 1
    return table("", [row[:width] for row in body], header=header[:width])


def render_reference(rows: Sequence[Key]) -> str:
    """Keys as a table of path, default with its unit, owner and meaning."""
    body = [(r.path, f"{r.default} {r.unit}".strip(), r.owner, r.meaning) for r in rows]
    return table("", body, header=("key", "default", "owner", "meaning"))


def as_json(rows: Sequence[Row | Key]) -> str:
    """The rows as a JSON array of objects."""
    return json.dumps([row._asdict() for row in rows], indent=2)
