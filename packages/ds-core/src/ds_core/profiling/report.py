"""A profile as text: a summary, the largest modules of each depth, and the tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_core.profiling.profile import ModuleProfile, Profile

_COLUMNS = (
    "module", "class", "params", "%", "MACs", "%", "FLOPs fwd", "recompute", "bwd", "%", "fwd", "%",
    "recompute", "bwd", "FLOP/s fwd",
)  # fmt: skip
_NOTES = (
    "MACs: multiply-accumulates of the forward. FLOPs: operations of matrix products, attention",
    "and convolutions, two per MAC; % of all FLOPs. Times (fwd, recompute, bwd): in the module,",
    "with the profiler's own cost; bwd: of its operations alone. A module's figures hold",
    "those of the modules below it; what it does itself makes up the difference.",
)


def written(
    profile: Profile, *, module_depth: int = -1, top_modules: int = 1, detailed: bool = True
) -> str:
    """The whole report.

    Args:
        profile: what was measured.
        module_depth: deepest level of modules to show; 0 is the model alone, -1 all.
        top_modules: how many of the largest modules of each level are named.
        detailed: whether the tree is shown too.
    """
    parts = [_summary(profile)]
    levels = _levels(profile.model, module_depth)
    if top_modules > 0 and len(levels) > 1:
        parts.append(_largest(profile, levels, top_modules))
    if detailed:
        parts.append(_tree(profile, module_depth))
    return "\n\n".join(parts) + "\n"


def number(value: float, unit: str = "") -> str:
    """A count in thousands, millions, ...: "1.23 G" (of `unit`); exact below a thousand."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.2f} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def seconds(value: float) -> str:
    """A time in s, ms or us."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return "0" if value == 0 else f"{value / 1e-6:.2f} us"


def _summary(profile: Profile) -> str:
    rows = [
        ("parameters", number(profile.parameters)),
        ("forwards", str(profile.model.calls)),
        ("forward", f"{number(profile.macs)} MACs, {number(profile.forward_flops)} FLOPs"),
    ]
    if profile.backward_flops or profile.recompute_flops:
        rows.append(("backward", f"{number(profile.backward_flops)} FLOPs"))
        rows.append(("recomputation", f"{number(profile.recompute_flops)} FLOPs"))
    elements = profile.model.elementwise_flops + profile.outside.elementwise_flops
    rows.append(("elementwise, not in FLOPs", f"{number(elements)} elements"))
    rows.append(("forward time", seconds(profile.forward_s)))
    if profile.backward_s:
        rows.append(("backward time", seconds(profile.backward_s)))
    for name, count in sorted(profile.uncounted.items()):
        rows.append(("not counted, no formula", f"{name}, {count} calls"))
    return _aligned([list(row) for row in rows], left=2)


def _levels(model: ModuleProfile, module_depth: int) -> list[list[ModuleProfile]]:
    levels: list[list[ModuleProfile]] = []
    for depth, module in model.walk():
        if module_depth < 0 or depth <= module_depth:
            levels += [[] for _ in range(depth + 1 - len(levels))]
            levels[depth].append(module)
    return levels


def _largest(profile: Profile, levels: Sequence[Sequence[ModuleProfile]], count: int) -> str:
    """The `count` largest classes of modules of each depth, by three measures."""
    measures: tuple[tuple[str, Callable[[ModuleProfile], float], Callable[[float], str]], ...] = (
        ("params", lambda module: module.parameters, number),
        ("FLOPs", lambda module: module.flops, number),
        ("fwd time", lambda module: module.forward_s, seconds),
    )
    rows = [["depth", *(f"most {name}" for name, _, _ in measures)]]
    for depth, modules in enumerate(levels):
        row = [str(depth)]
        for _, value, told in measures:
            sums: dict[str, float] = {}
            for module in modules:
                sums[module.kind] = sums.get(module.kind, 0) + value(module)
            best = sorted(sums.items(), key=lambda item: -item[1])[:count]
            row.append(", ".join(f"{kind} {told(total)}" for kind, total in best))
        rows.append(row)
    return "Largest classes of modules, by depth\n" + _aligned(rows, left=4)


def _tree(profile: Profile, module_depth: int) -> str:
    rows = [list(_COLUMNS)]
    for depth, module in profile.model.walk():
        if module_depth < 0 or depth <= module_depth:
            label = module.name.rpartition(".")[2] or "(model)"
            rows.append(_row(profile, module, "  " * depth + label))
    if profile.outside.flops:
        rows.append(_row(profile, profile.outside, profile.outside.name))
    return "\n".join([_aligned(rows, left=2), "", *_NOTES])


def _row(profile: Profile, module: ModuleProfile, label: str) -> list[str]:
    timed = module.forward_flops and module.forward_s
    rate = number(module.forward_flops / module.forward_s, "FLOP/s") if timed else "-"
    times = f" x{module.calls}" if module.calls > profile.model.calls else ""
    return [
        label + times,
        module.kind,
        number(module.parameters),
        _share(module.parameters, profile.parameters),
        number(module.macs),
        _share(module.macs, profile.macs),
        number(module.forward_flops),
        number(module.recompute_flops),
        number(module.backward_flops),
        _share(module.flops, profile.flops),
        seconds(module.forward_s),
        _share(module.forward_s, profile.forward_s),
        seconds(module.recompute_s),
        seconds(module.backward_s),
        rate,
    ]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


def _aligned(rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Columns two spaces apart: the first `left` of them to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
