"""How `ds checkpoint` shows what it found, and reads what it was given."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ds_core.cli.tables import table
from ds_core.errors import CheckpointError
from ds_core.quantities import told_bytes

if TYPE_CHECKING:
    from ds_core.checkpoint import ImportReport, Inspection

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SHOWN_TENSORS = 40


def as_json(found: Any) -> str:
    """A result's fields as JSON."""
    return json.dumps(dataclasses.asdict(found), indent=2, default=str)


def inspection_table(found: Inspection, *, every: bool) -> str:
    """What `ds checkpoint inspect` prints."""
    writer = found.writer
    saved_by = [
        _counted(writer["world_size"], "rank") if "world_size" in writer else "",
        f"ds-core {writer['ds_core']}" if "ds_core" in writer else "",
        f"torch {writer['torch']}" if "torch" in writer else "",
        str(writer.get("saved_at", "")),
    ]
    total = sum(found.bytes_by_kind.values())
    facts = {
        "path": found.path,
        "tags": ", ".join(f"{t} (latest)" if t == found.latest else t for t in found.tags),
        "step": "not saved by an engine" if found.step is None else found.step,
        "saved by": ", ".join(filter(None, saved_by)) or "not recorded",
        "state": found.sharding or "not recorded",
        "size": f"{told_bytes(total)} in {len(found.tensors)} tensors and {len(found.files)} files",
    }
    if found.aliases:
        facts["tied"] = ", ".join(f"{alias} = {name}" for alias, name in found.aliases.items())
    if found.frozen:
        facts["frozen"] = f"{len(found.frozen)} parameters, such as {found.frozen[0]}"
    parts = [table("Checkpoint", facts.items()), table("Sizes", _kinds(found))]
    parts.append(_tensors(found, every=every))
    if found.groups:
        rows = [
            (i, group["num_parameters"], _settings(group)) for i, group in enumerate(found.groups)
        ]
        parts.append(table("Optimizer groups", rows, header=("group", "parameters", "settings")))
    if found.client_state:
        rows_of = [(key, _shown(value)) for key, value in found.client_state.items()]
        parts.append(table("Client state", rows_of))
    return "\n".join(parts)


def _kinds(found: Inspection) -> Iterable[tuple[object, ...]]:
    for kind, num_bytes in found.bytes_by_kind.items():
        members = [facts for facts in found.tensors.values() if facts.kind == kind]
        dtypes = ", ".join(sorted({facts.dtype for facts in members}))
        yield kind, told_bytes(num_bytes), _counted(len(members), "tensor"), dtypes


def _tensors(found: Inspection, *, every: bool) -> str:
    chosen = [
        facts
        for facts in found.tensors.values()
        if every or facts.kind in ("parameters", "buffers")
    ]
    limit = len(chosen) if every else _SHOWN_TENSORS
    rows = [
        (
            facts.name,
            "x".join(map(str, facts.shape)) or "scalar",
            facts.dtype,
            told_bytes(facts.num_bytes),
            facts.num_boxes,
            len(facts.files),
        )
        for facts in chosen[:limit]
    ]
    if not rows:
        return ""
    header = ("tensor", "shape", "dtype", "size", "boxes", "files")
    rest = len(found.tensors) - len(rows)
    more = f"and {rest} more: --tensors lists them\n" if rest else ""
    return table("Tensors", rows, header=header) + more


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _settings(group: Any) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in group.items() if "num_" not in key)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def import_table(report: ImportReport) -> str:
    """What `ds checkpoint import` prints: what became of every tensor."""
    facts = {
        "read": report.source,
        "written": f"{report.path}: {report.num_tensors} tensors, each of them once",
    }
    parts = [table("Import", facts.items())]
    parts.append(table("Sizes", [(kind, told_bytes(n)) for kind, n in report.num_bytes.items()]))
    for title, rows in (
        ("Tied weights, stored once", list(report.aliases.items())),
        ("Missing", [(text,) for text in report.missing]),
        ("Unexpected, left out", [(text,) for text in report.unexpected]),
        ("Left out on purpose", list(report.ignored.items())),
    ):
        if rows:
            parts.append(table(title, rows))
    if not (report.missing or report.unexpected):
        parts.append("Nothing is missing, and nothing is left over.\n")
    return "\n".join(parts)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that an option names."""
    return _DTYPES[name]


def bytes_of(text: str) -> int:
    """The bytes that "5GB", "512MiB" or "1000" mean. Raises CheckpointError for other texts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    units = {**_UNITS, **_BINARY_UNITS}
    if match is None or match[2] not in units:
        raise CheckpointError(
            f"--max-shard-size: got {text!r}, expected a number and a unit: 500MB, 5GB, 2GiB"
        )
    return int(float(match[1]) * units[match[2]])


def pairs_of(texts: Iterable[str], option: str) -> dict[str, str]:
    """`NAME=OTHER` options as a dictionary. Raises CheckpointError for one of another form."""
    pairs = {}
    for text in texts:
        name, equals, other = text.partition("=")
        if not (name and equals and other):
            raise CheckpointError(f"{option}: got {text!r}, expected NAME=OTHER")
        pairs[name] = other
    return pairs
