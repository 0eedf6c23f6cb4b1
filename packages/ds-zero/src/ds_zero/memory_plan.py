"""`MemoryPlan`: what one rank needs on its device, in host memory and on disk, and whether it fits.

Made before anything is allocated, from the layouts that the run will make. What outlives a step is
exact, byte for byte what `ZeroOptimizer.memory_by_tier` counts; what comes and goes is what the
run is sure to need: whole units, their gradients, and buffers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from ds_core.quantities import told_bytes
from ds_zero.holdings import KINDS, PLACES, Place, by_place
from ds_zero.init import held_bytes
from ds_zero.offload.buffers import whole_pages
from ds_zero.room import Room
from ds_zero.unit_plan import UnitPlan, accumulates_locally, plan_unit_buffers


@dataclass(frozen=True)
class MemoryPlan:
    """The needs of one rank, and the room that there is.

    Attributes:
        title: what is planned.
        held: bytes that outlive a step, by place and kind; "padding" is part of the others.
        buffers: at most, of what offloaded state passes through, by place.
        undo: what takes speculative steps back, from backward until the step, by place.
        moving: beyond all that, if the states of Twin-Flow's "auto" go to one side.
        transient: bytes that come and go beside that: whole units and local gradients.
        laying_out: the most that is there while units are made, one after the other.
        present: bytes of the model as it is now, which go as its units are made.
        files: the swap files: (folder, bytes).
        activations: bytes of one micro-batch; None: not known, and not counted.
        room: what is free now.
        local_ranks: ranks on this host, which share its memory and its disks.
        advice: the least change with which it would fit; empty if it does.
    """

    title: str
    held: Mapping[Place, Mapping[str, int]]
    buffers: Mapping[Place, int]
    transient: Mapping[Place, int]
    laying_out: Mapping[Place, int]
    present: Mapping[Place, int]
    files: tuple[tuple[str, int], ...] = ()
    activations: int | None = None
    room: Room = field(default_factory=Room)
    local_ranks: int = 1
    undo: Mapping[Place, int] = field(default_factory=dict)
    moving: Mapping[Place, int] = field(default_factory=dict)
    advice: str = ""

    def persistent(self, place: Place) -> int:
        """Bytes of a place that outlive a step, without buffers."""
        return sum(self.held.get(place, {}).get(kind, 0) for kind in KINDS)

    def needed(self, place: Place) -> int:
        """The most bytes of a place that are in use at once."""
        if place == "disk":
            return sum(size for _, size in self.files)
        at_work = self.persistent(place)
        for also in (self.buffers, self.undo, self.moving, self.transient):
            at_work += also.get(place, 0)
        return max(at_work, self.laying_out.get(place, 0))

    def to_come(self, place: Place) -> int:
        """Bytes that must be free now."""
        return max(0, self.needed(place) - self.present.get(place, 0))

    @property
    def fits(self) -> bool:
        """Whether every place has the room, if all ranks of this host need the same."""
        return not complaints([self] * self.local_ranks)

    def table(self) -> str:
        """All of it as text, a line per kind and a column per place."""
        places = [place for place in PLACES if self.needed(place) or place == "host"]
        rows = [("", *places)]

        def row(name: str, size_of: Mapping[Place, int]) -> None:
            if any(size_of.get(place) for place in places):
                rows.append((name, *(_told(size_of.get(place, 0)) for place in places)))

        for kind in KINDS:
            row(kind, {place: self.held.get(place, {}).get(kind, 0) for place in places})
        row("= between steps", {place: self.persistent(place) for place in places})
        row("  of which padding", {p: self.held.get(p, {}).get("padding", 0) for p in places})
        row("buffers, at most", self.buffers)
        row("to take steps back", self.undo)
        row("if states move", self.moving)
        row("whole units, local gradients", self.transient)
        row("while units are made", self.laying_out)
        rows.append(("= needed", *(_told(self.needed(place)) for place in places)))
        row("the model now, which goes", self.present)
        rows.append(("free now", *(self._free(place) for place in places)))
        text = f"Memory of one rank: {self.title}\n{_aligned(rows)}"
        notes = ["activations are not counted"] if self.activations is None else []
        if self.activations:
            notes.append(f"{told_bytes(self.activations)} of activations are among what comes")
        if self.local_ranks > 1:
            notes.append(f"{self.local_ranks} ranks share this host's memory and disks")
        lines = [*(f"{note}\n" for note in notes), *(f"{each}\n" for each in self._verdict())]
        return text + "".join(lines)

    def _free(self, place: Place) -> str:
        free = {"device": self.room.device, "host": self.room.memory, "disk": self.room.disk}[place]
        return "not bounded" if free is None else told_bytes(free)

    def _verdict(self) -> list[str]:
        found = complaints([self] * self.local_ranks)
        if not found:
            return ["It fits."]
        return [*dict.fromkeys(found), *([self.advice] if self.advice else [])]


def planned(
    units: Sequence[UnitPlan],
    *,
    title: str,
    room: Room | None = None,
    local_ranks: int = 1,
    activations: int | None = None,
    is_present: bool = True,
) -> MemoryPlan:
    """The plan of a rank that holds these units.

    is_present: whether the model's parameters have memory now.
    """
    near = units[0].setup.near
    offload = units[0].setup.offload
    shards = [whole_pages(u.own * u.dtype.itemsize) for u in units if u.shard == "disk"]
    records = [size for unit in units for size in unit.records()]
    files = [(offload.folder, sum(records)), (offload.folder_of_parameters, sum(shards))]
    owned = [sum(map(held_bytes, _params(unit))) if is_present else 0 for unit in units]
    return MemoryPlan(
        title=title,
        held=by_place(each for unit in units for each in unit.holdings()),
        buffers={"host": buffer_bytes(units)},
        transient=_transient(units, activations or 0),
        laying_out={near: _laying_out(units, owned)},
        present={near: sum(owned)},
        files=tuple((folder or "a folder", size) for folder, size in files if size),
        activations=activations,
        room=room or Room(),
        local_ranks=local_ranks,
        undo={"host": sum(unit.undo() for unit in units)},
        moving=_moving(units),
    )


def buffer_bytes(units: Sequence[UnitPlan]) -> int:
    """The most of host memory that offloaded state passes through, and that stays allocated."""
    offload = units[0].setup.offload
    shards = [whole_pages(u.own * u.dtype.itemsize) for u in units if u.shard == "disk"]
    records = [size for unit in units for size in unit.records()]
    pools = _pool(offload.buffers, records) + _pool(offload.parameter_buffers, shards)
    apart = sum(unit.important() for unit in units)
    if _steps_rest_beside(units):
        apart += sum(unit.mean_of_rest() for unit in units)
    return pools + apart + sum(unit.passing() for unit in units)


def _steps_rest_beside(units: Sequence[UnitPlan]) -> bool:
    zenflow = units[0].setup.zenflow
    return zenflow is not None and zenflow.overlap_step


def _moving(units: Sequence[UnitPlan]) -> dict[Place, int]:
    """What each place needs more if the states of all units, or of none, come to be there."""
    setup = units[0].setup
    if not setup.may_move or sum(unit.spec.trainable for unit in units) < 2:
        return {}
    specs, before, most = [unit.spec for unit in units], _held(units), dict[Place, int]()
    for ratio in (0.0, 1.0):
        offload = replace(setup.offload, ratio=ratio)
        after = _held(plan_unit_buffers(specs, replace(setup, offload=offload)))
        for place, size in after.items():
            most[place] = max(most.get(place, 0), size - before.get(place, 0))
    return most


def _held(units: Sequence[UnitPlan]) -> dict[Place, int]:
    """Bytes by place that outlive a step, buffers and what takes it back included."""
    found: dict[Place, int] = {"host": buffer_bytes(units) + sum(unit.undo() for unit in units)}
    for each in (each for unit in units for each in unit.holdings()):
        found[each.place] = found.get(each.place, 0) + each.nbytes
    return found


def _params(unit: UnitPlan) -> Iterable[nn.Parameter]:
    return (spec.param for spec in unit.spec.params)


def _pool(count: int, sizes: list[int]) -> int:
    return min(count, len(sizes)) * max(sizes, default=0)


def _transient(units: Sequence[UnitPlan], activations: int) -> dict[Place, int]:
    """While computing: the root, one other unit with its gradients, and those gathered ahead.

    While updating: one gradient in the dtype that the optimizer wants, or a mean of several.
    """
    others = [unit for unit in units if not unit.spec.is_root]
    ahead = 1 + (units[0].setup.prefetch if len(others) > 1 else 0)
    whole = sum(u.gathered() for u in units if u.spec.is_root)
    whole += sum(sorted((u.gathered() for u in others), reverse=True)[:ahead])
    # The gradients of the root are complete when its backward ends, after all others.
    made = sum(u.local_gradients() for u in units if u.spec.is_root)
    made += max((u.local_gradients() for u in others), default=0)
    if accumulates_locally(units):
        made = sum(u.local_gradients() for u in units)
    computing = whole + made + activations
    recast = max(unit.recast() for unit in units)
    mean = 0 if _steps_rest_beside(units) else max(unit.mean_of_rest() for unit in units)
    if units[0].setup.is_host:
        return {"host": max(computing, recast + mean)}
    return {"device": max(computing, recast), "host": mean}


def _laying_out(units: Sequence[UnitPlan], owned: Sequence[int]) -> int:
    """The most that is there while units take the parameters over, one after the other."""
    near, built, remaining, most = units[0].setup.near, 0, sum(owned), 0
    for unit, own in zip(units, owned, strict=True):
        most = max(most, remaining + built + unit.staged())
        remaining -= own
        # The optimizer allocates its state in the first step only.
        built += sum(h.nbytes for h in unit.holdings() if h.place == near and h.kind != "optimizer")
    return most


# ---------------------------------------------------------------------- whether it fits


def complaints(plans: Sequence[MemoryPlan]) -> list[str]:
    """What does not fit, of ranks that run at once; each says how much is missing where.

    Ranks of one host share its memory, and disks; of an accelerator, and of the limits on a
    process, each has its own.
    """
    found: list[str] = []
    for plan in plans:
        found += _of_one(plan)
    by_host: dict[str, list[MemoryPlan]] = {}
    by_disk: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for plan in plans:
        by_host.setdefault(plan.room.host_name, []).append(plan)
        disks, ids = dict(plan.room.disks), dict(plan.room.disk_ids)
        for folder, size in plan.files:
            if folder in disks:
                key = (plan.room.host_name, ids.get(folder, folder))
                by_disk.setdefault(key, []).append((folder, size, disks[folder]))
    for host, members in by_host.items():
        free = min((p.room.host for p in members if p.room.host is not None), default=None)
        wanted = sum(plan.to_come("host") for plan in members)
        if free is not None and wanted > free:
            found.append(_short(f"host memory{_on(host)}", wanted, free, len(members)))
    for (host, _), entries in by_disk.items():
        wanted, free = sum(size for _, size, _ in entries), min(free for _, _, free in entries)
        if wanted > free:
            what = f"the disk of {entries[0][0]!r}{_on(host)}"
            found.append(_short(what, wanted, free, 0) + "; free some, or give another folder")
    return list(dict.fromkeys(found))


def _of_one(plan: MemoryPlan) -> list[str]:
    found = []
    room = plan.room
    if room.device is not None and plan.to_come("device") > room.device:
        found.append(_short("device memory", plan.to_come("device"), room.device, 0))
    if room.process is not None and plan.to_come("host") > room.process:
        limits = "memory under the limits of this process (ulimit -d, -v)"
        found.append(_short(limits, plan.to_come("host"), room.process, 0))
    for folder, size in plan.files:
        if room.file is not None and size > room.file:
            found.append(
                f"It does not fit: a file of {told_bytes(size)} in {folder!r}, and this process "
                f"may write files of {told_bytes(room.file)} (ulimit -f); raise that limit"
            )
    return found


def _on(host: str) -> str:
    return f" on {host}" if host else ""


def _short(what: str, wanted: int, free: int, ranks: int) -> str:
    needed = f"{ranks} ranks need" if ranks > 1 else "needed are"
    return (
        f"It does not fit: {what}: {needed} {told_bytes(wanted)} more, {told_bytes(free)} are free"
    )


def _told(size: int) -> str:
    return told_bytes(size) if size else "-"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "".join(f"  {line.rstrip()}\n" for line in lines)
