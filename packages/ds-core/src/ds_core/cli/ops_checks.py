"""`ds ops check`: every implementation against the reference, and what was found last time."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from ds_core import accelerator, ops
from ds_core.cli import ops_tools
from ds_core.cli.tables import table
from ds_core.errors import BuildError, DsError, OpError
from ds_core.ops.checking import compare
from ds_core.ops.reference import REFERENCE
from ds_core.seams import Op

_FILE = "checks.json"


@dataclass(frozen=True)
class Check:
    """How one implementation compared on one kind of device.

    Attributes:
        op, implementation, device: what was checked, and where.
        cases: calls that were compared.
        error: the largest relative distance from float64; None for a random op, whose results
            only tests of its own can judge.
        problem: what is wrong; empty if nothing is.
        when: in UTC, ISO 8601.
        version: of what the implementations are made from.
        torch: its version.
    """

    op: str
    implementation: str
    device: str
    cases: int
    error: float | None
    problem: str
    when: str
    version: str
    torch: str

    def __str__(self) -> str:
        if self.problem:
            return f"WRONG: {self.problem}"
        return "ran" if self.error is None else f"error {self.error:.1e}"


def device_types() -> list[str]:
    """The kinds of device that ops can be on here."""
    return list(dict.fromkeys([accelerator.current().device().type, "cpu"]))


def check(names: Sequence[str], impl: str = "") -> list[Check]:
    """Compare implementations with the reference on the cases of their op.

    Args:
        names: of ops; none: all.
        impl: only this implementation; "": all that can run, and the reference if nothing else.

    Raises OpError for an op or implementation that does not exist, BuildError for one that does
    not build.
    """
    chosen = [ops.get(name) for name in names or ops.names()]
    found = []
    for op in chosen:
        for device_type in device_types():
            for name in _runnable(op, device_type, impl):
                found.append(_check(op, name, device_type))
    if impl and not found:
        raise OpError(
            f"ds ops check: no implementation {impl!r} of these ops can run here; "
            f"{_offered(chosen, impl)}"
        )
    return found


def _offered(chosen: Sequence[Op], impl: str) -> str:
    """Why an implementation of these ops cannot run here; or which there are, if it is none."""
    reasons: dict[str, str] = {}
    for op in chosen:
        for device_type in device_types():
            for name, reason in ops.available(op.name, device_type).items():
                reasons[name] = reasons.get(name) or reason or ""
    if impl in reasons:
        return f"it is {reasons[impl]}" if reasons[impl].startswith("for ") else reasons[impl]
    return f"there are {', '.join(reasons)}"


def _runnable(op: Op, device_type: str, impl: str) -> list[str]:
    offered = ops.available(op.name, device_type)
    able = [name for name, reason in offered.items() if reason is None]
    if impl:
        return [name for name in able if name == impl]
    return [name for name in able if name != REFERENCE] or able


def _check(op: Op, name: str, device_type: str) -> Check:
    def compute(*args: object) -> object:
        return ops.run(op.name, *args, impl=name)

    refusal = ops.choose(op.name, device_type, name).implementation.partly()

    worst, cases, problem = 0.0, 0, ""
    for dtype in op.dtypes:
        for index, args in enumerate(op.cases(torch.device(device_type), dtype)):
            if refusal is not None and refusal(*args) is not None:
                continue
            cases += 1
            try:
                finding = compare(op, compute, args)
            except BuildError:
                raise
            except (DsError, RuntimeError, TypeError, ValueError) as error:
                problem = problem or f"{dtype}, case {index}: {' '.join(str(error).split())}"
                continue
            worst = max(worst, finding.error)
            if finding.problem:
                problem = problem or f"{dtype}, case {index}: {finding.problem}"
    return Check(
        *(op.name, name, device_type, cases),
        error=worst if op.measured else None,
        problem=problem,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        version=ops_tools.version(),
        torch=torch.__version__,
    )


def record(found: Sequence[Check]) -> str:
    """Keep what was found for `ds ops report`; says why where that is not possible."""
    folder = _folder()
    if isinstance(folder, str):
        return folder
    kept = {**recorded(), **{_key(row.op, row.implementation, row.device): row for row in found}}
    text = json.dumps([dataclasses.asdict(row) for row in kept.values()], indent=1)
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, folder / _FILE)
    except OSError as error:
        return f"not kept for `ds ops report`: {folder}: {error.strerror}"
    return ""


def recorded() -> dict[tuple[str, str, str], Check]:
    """What was found last, by op, implementation and device; empty where nothing can be read."""
    folder = _folder()
    if isinstance(folder, str):
        return {}
    try:
        rows = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        checks = [Check(**row) for row in rows]
    except (OSError, ValueError, TypeError):
        return {}
    return {_key(row.op, row.implementation, row.device): row for row in checks}


def _key(op: str, implementation: str, device: str) -> tuple[str, str, str]:
    return op, implementation, device


def _folder() -> Path | str:
    """Where findings are kept, or why there is no such place."""
    for tool in ops_tools.installed():
        try:
            return tool.folder()
        except BuildError as error:
            return f"not kept for `ds ops report`: {error}"
    return ""


def render(found: Sequence[Check], note: str) -> str:
    """The findings as a table, and what came of keeping them."""
    rows = [(row.op, row.implementation, row.device, row.cases, str(row)) for row in found]
    text = table("", rows, header=("op", "by", "on", "cases", "result"))
    wrong = sum(1 for row in found if row.problem)
    told = f"{wrong} of {len(found)} are wrong" if wrong else f"all {len(found)} are right"
    return f"{text}{told}\n" + (f"{note}\n" if note else "")


def as_json(found: Sequence[Check]) -> str:
    """The findings as a JSON array."""
    return json.dumps([dataclasses.asdict(row) for row in found], indent=2)
