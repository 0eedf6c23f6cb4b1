"""Hostfiles: the hosts of a cluster and how many processes each can take.

# one host per line; what follows # is a comment
host1 slots=8
host2 slots=8
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ds_core.errors import LaunchError

#: No leading dash (ssh would read an option), none of the characters of the filter grammar.
HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LINE = re.compile(r"(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\S+)")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: a name to connect to, and its number of slots (devices)."""

    name: str
    slots: int


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file, in its order.

    Raises LaunchError if the file cannot be read, or names every line of it that is wrong.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise LaunchError(f"--hostfile: {path} cannot be read: {reason}") from error
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, source: str) -> tuple[Host, ...]:
    """The hosts in the text of a hostfile; `source` names it in errors.

    Raises LaunchError that lists every line that is wrong, or if there is no host at all.
    """
    hosts: dict[str, Host] = {}
    line_of: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        try:
            host = _host(content)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if host.name in hosts:
            problems.append(
                f"line {number}: {host.name} is on line {line_of[host.name]} already; "
                "give each host one line with all its slots"
            )
            continue
        hosts[host.name], line_of[host.name] = host, number
    if problems:
        raise LaunchError("\n".join([f"--hostfile: {source} has mistakes:", *problems]))
    if not hosts:
        raise LaunchError(f"--hostfile: {source} names no host; expected lines `HOST slots=N`")
    return tuple(hosts.values())


def _host(content: str) -> Host:
    match = _LINE.fullmatch(content)
    if match is None:
        raise ValueError(f"got {content!r}, expected `HOST slots=N`")
    name, slots = match["name"], match["slots"]
    if not HOST_NAME.fullmatch(name):
        raise ValueError(
            f"got host {name!r}, expected a host name or IPv4 address "
            "(a user name or port belongs in ~/.ssh/config or --launcher-option)"
        )
    if not slots.isdecimal() or int(slots) < 1:
        raise ValueError(f"got slots={slots}, expected a number of at least 1")
    return Host(name, int(slots))
