"""`ds ops report`, and the ops in `ds report`: who computes each, and why not something faster."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from ds_core import ops
from ds_core.cli import ops_tools
from ds_core.cli.ops_checks import Check, device_types, recorded
from ds_core.cli.tables import table
from ds_core.errors import DsError
from ds_core.ops.reference import REFERENCE
from ds_core.seams import KernelSource

#: So many ops are named in a summary.
_FEW = 4


@dataclass(frozen=True)
class OpRow:
    """Who computes an op on a kind of device.

    Attributes:
        op, device: "*" for both if nothing can be said of any op.
        implementation: that would be chosen; empty if none can be.
        state: "python", "prebuilt", "cached", "will build" or "jit".
        unavailable: those that cannot run there, each with why.
        missed: the names of those among them that are meant for such devices, and would be better.
        others: those that could, were they asked for by name.
        problem: why none can be chosen, or the chosen one will fail; empty if all is well.
        checked: what `ds ops check` found last; empty if it never ran.
        rest: those that compute, in this order, the calls that it does not take.
    """

    op: str
    device: str
    implementation: str = ""
    state: str = ""
    unavailable: dict[str, str] = field(default_factory=dict)
    missed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    problem: str = ""
    checked: str = ""
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpFindings:
    """Everything that `ds ops report` shows.

    Attributes:
        advice: what to do, in a line or two.
        rows: one per op and kind of device.
        facts: what building depends on here.
        kernels: those for GPUs, each with its source's digest and where that ran.
    """

    advice: list[str]
    rows: list[OpRow]
    facts: dict[str, str]
    kernels: list[KernelSource] = field(default_factory=list)

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def collect() -> OpFindings:
    """Look at every op on every kind of device here. Builds nothing and computes nothing."""
    rows = op_rows()
    return OpFindings(advice(rows), rows, tool_facts(), _kernels())


def _kernels() -> list[KernelSource]:
    try:
        return [kernel for tool in ops_tools.installed() for kernel in tool.kernels()]
    except DsError:
        return []  # `tool_facts` tells of it


def tool_facts() -> dict[str, str]:
    """What the packages with kernels say of compilers, limits and caches."""
    facts: dict[str, str] = {}
    try:
        for tool in ops_tools.installed():
            facts |= tool.facts()
    except DsError as error:
        facts["problem"] = _one_line(error)
    return facts


def op_rows() -> list[OpRow]:
    """Who computes each op on this process's kinds of device."""
    try:
        names = ops.names()
        ops.implementations(names[0])
        known, version = recorded(), ops_tools.version()
    except DsError as error:
        return [OpRow("*", "*", problem=_one_line(error))]
    return [_row(op, device, known, version) for op in names for device in device_types()]


def _row(op: str, device: str, known: dict[tuple[str, str, str], Check], version: str) -> OpRow:
    offered = ops.available(op, device)
    unavailable = {name: reason for name, reason in offered.items() if reason is not None}
    try:
        choice = ops.choose(op, device)
    except DsError as error:
        return OpRow(op, device, unavailable=unavailable, problem=_one_line(error))
    chosen, missed = choice.implementation, tuple(choice.passed)
    rest = tuple(impl.name for impl in choice.rest)
    others = tuple(n for n in offered if n not in (chosen.name, *rest, *unavailable))
    state, problem = "", ""
    try:
        state = chosen.state(device)
    except DsError as error:
        state, problem = "cannot build", _one_line(error)
    checked = _told(known.get((op, chosen.name, device)), version)
    return OpRow(
        op, device, chosen.name, state, unavailable, missed, others, problem, checked, rest
    )


def _told(check: Check | None, version: str) -> str:
    if check is None:
        return ""
    if check.version != version:
        return "not checked at this version"
    return f"{check}, {check.when[:10]}, at {check.version}"


def advice(rows: Sequence[OpRow]) -> list[str]:
    """What a newcomer should know and do, in a line for each thing."""
    problems = list(dict.fromkeys(row.problem for row in rows if row.problem))
    if len(problems) > _FEW:
        return [*problems[:_FEW], f"and {len(problems) - _FEW} more such problems"]
    if problems:
        return problems
    if not any(row.unavailable or row.others for row in rows):
        return [
            "All ops are computed by plain torch, the reference. For fast kernels: pip install "
            "ds-ops"
        ]
    return [
        line
        for device in dict.fromkeys(row.device for row in rows)
        for line in _advice_on(device, [row for row in rows if row.device == device])
    ]


def _advice_on(device: str, rows: Sequence[OpRow]) -> list[str]:
    missed = {f"{name} on {device}: {row.unavailable[name]}" for row in rows for name in row.missed}
    found = [f"Slower than it could be: {text}" for text in sorted(missed)]
    fast = [row for row in rows if row.implementation != REFERENCE]
    building = sum(row.state == "will build" for row in fast)
    if building:
        found.append(
            f"{building} ops on {device} have a fast implementation that is built when one is "
            f"first used, once, in about a minute; `ds ops build` does it now"
        )
    if len(fast) > building:
        found.append(
            f"{len(fast) - building} of {len(rows)} ops on {device} have a fast implementation "
            f"that is ready"
        )
    if not fast and not missed:
        found.append(
            f"On {device} all ops are computed by plain torch: what is installed has no kernels "
            f"for it"
        )
    return found


def render(findings: OpFindings) -> str:
    """The findings as text for a terminal or an issue."""
    reasons: dict[str, int] = {}
    body = []
    for row in findings.rows:
        why = []
        for name, reason in row.unavailable.items():
            why.append(f"{name} [{reasons.setdefault(reason, len(reasons) + 1)}]")
        others = [name for name in row.others if name != REFERENCE]
        if others:
            why.append(f"{', '.join(others)} on request")
        state = row.state or "none"
        by = ", else ".join((row.implementation, *row.rest))
        body.append((row.op, row.device, by, state, row.checked or "-", "; ".join(why)))
    header = ("op", "on", "by", "state", "last check", "not by")
    parts = ["".join(f"{line}\n" for line in findings.advice), table("", body, header=header)]
    if reasons:
        parts.append(table("Why not", [(f"[{n}]", reason) for reason, n in reasons.items()]))
    if findings.kernels:
        sources: dict[tuple[str, ...], list[str]] = {}
        for kernel in findings.kernels:
            seen = ", ".join((*kernel.checks, kernel.ran))
            sources.setdefault((kernel.implementation, kernel.source, seen), []).append(kernel.op)
        told = [(*group, ", ".join(of)) for group, of in sources.items()]
        parts.append(table("Kernels for GPUs", told, header=("by", "source", "checks", "ops")))
    if findings.facts:
        parts.append(table("Here", findings.facts.items()))
    return "\n".join(parts)


def summary(rows: Sequence[OpRow]) -> list[tuple[str, str]]:
    """The rows in short, for `ds report`: how many ops each computes, or which, if they are few."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        group = (row.implementation or "nothing", row.device, row.state)
        groups.setdefault(group, []).append(row.op)
    found = []
    for (name, device, state), names in groups.items():
        told = ", ".join(names) if len(names) <= _FEW else f"{len(names)} ops"
        found.append((f"{name} on {device}", f"{state}: {told}" if state else told))
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
