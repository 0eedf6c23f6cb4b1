"""Which hosts of a hostfile a job uses, and which of their slots.

A filter is `HOST[:SLOTS]`, several of them joined by `@`. SLOTS are numbers and ranges joined by
commas; without them the whole host is meant: `host1:0,2@host2:4-7@host3`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ds_core.errors import LaunchError
from ds_core.launcher.hostfile import Host


@dataclass(frozen=True)
class SelectedHost:
    """A host that takes part, with one process for each of `slots`.

    `has_named_slots`: the user chose these slots by number, so they mean devices.
    """

    name: str
    slots: tuple[int, ...]
    has_named_slots: bool = False


def select_hosts(
    hosts: Sequence[Host],
    *,
    include: str | None = None,
    exclude: str | None = None,
    num_nodes: int | None = None,
    nproc: int | None = None,
) -> tuple[SelectedHost, ...]:
    """The hosts of a job in the order of the hostfile; the first one is node 0.

    Args:
        hosts: what there is.
        include: filter of what to use; everything if None.
        exclude: filter of what not to use. Not together with `include`.
        num_nodes: use the first so many of the hosts that are left.
        nproc: use the first so many slots of each of them.

    Raises LaunchError for a filter that names what is not there, or leaves nothing.
    """
    if include is not None and exclude is not None:
        raise LaunchError("--include and --exclude exclude each other; give one of them")
    chosen = tuple(SelectedHost(host.name, tuple(range(host.slots))) for host in hosts)
    if include is not None:
        chosen = _included(hosts, parse_filter(include, hosts, "--include"))
    elif exclude is not None:
        chosen = _left_over(hosts, parse_filter(exclude, hosts, "--exclude"))
        if not chosen:
            raise LaunchError(f"--exclude: {exclude} leaves no host")
    if num_nodes is not None:
        if not 1 <= num_nodes <= len(chosen):
            raise LaunchError(
                f"--num-nodes: got {num_nodes}, expected 1 to {len(chosen)}: "
                f"{', '.join(host.name for host in chosen)}"
            )
        chosen = chosen[:num_nodes]
    return chosen if nproc is None else tuple(_first_slots(host, nproc) for host in chosen)


def parse_filter(
    text: str, hosts: Sequence[Host], option: str
) -> dict[str, tuple[int, ...] | None]:
    """What a filter names: slots by host, None for a whole host.

    Raises LaunchError for a host or slot that `hosts` lacks, or for words that are no filter.
    """
    slots_of = {host.name: host.slots for host in hosts}
    named: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        name, colon, numbers = part.strip().partition(":")
        if name not in slots_of:
            raise LaunchError(f"{option}: {_unknown_host(name, text, list(slots_of))}")
        if name in named:
            raise LaunchError(f"{option}: {name} appears twice in {text!r}; name it once")
        named[name] = _slots(numbers, name, slots_of[name], option) if colon else None
    return named


def _unknown_host(name: str, text: str, known: Sequence[str]) -> str:
    if not name:
        return f"got {text!r}, expected HOST[:SLOTS] joined by @, such as host1:0,2@host2"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name!r} is not in the hostfile, which has {', '.join(known)}{hint}"


def _slots(text: str, host: str, num_slots: int, option: str) -> tuple[int, ...]:
    chosen: list[int] = []
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise LaunchError(
                f"{option}: got slots {text!r} of {host}, expected numbers and ranges joined by "
                f"commas, such as {host}:0,2 or {host}:0-3"
            )
        numbers = range(int(first), int(last or first) + 1)
        if not numbers or numbers[-1] >= num_slots:
            raise LaunchError(
                f"{option}: {host} has slots 0 to {num_slots - 1} by the hostfile, got {word}"
            )
        chosen.extend(numbers)
    repeated = sorted({number for number in chosen if chosen.count(number) > 1})
    if repeated:
        raise LaunchError(f"{option}: slot {repeated[0]} of {host} appears twice in {text!r}")
    return tuple(sorted(chosen))


def _included(
    hosts: Sequence[Host], named: dict[str, tuple[int, ...] | None]
) -> tuple[SelectedHost, ...]:
    chosen = []
    for host in hosts:
        if host.name in named:
            slots = named[host.name]
            whole = tuple(range(host.slots))
            chosen.append(SelectedHost(host.name, slots or whole, slots is not None))
    return tuple(chosen)


def _left_over(
    hosts: Sequence[Host], named: dict[str, tuple[int, ...] | None]
) -> tuple[SelectedHost, ...]:
    chosen = []
    for host in hosts:
        if host.name not in named:
            chosen.append(SelectedHost(host.name, tuple(range(host.slots))))
            continue
        without = named[host.name]
        if without is None:
            continue
        slots = tuple(slot for slot in range(host.slots) if slot not in without)
        if slots:
            chosen.append(SelectedHost(host.name, slots, has_named_slots=True))
    return tuple(chosen)


def _first_slots(host: SelectedHost, nproc: int) -> SelectedHost:
    if not 1 <= nproc <= len(host.slots):
        raise LaunchError(
            f"--nproc: got {nproc}, but {host.name} has {len(host.slots)} slots in this job; "
            "raise `slots=` in the hostfile, or leave the host out with --exclude"
        )
    return SelectedHost(host.name, host.slots[:nproc], host.has_named_slots)
