from __future__ import annotations

from pathlib import Path

import pytest

from ds_core.errors import LaunchError
from ds_core.launcher.hostfile import Host, parse_hostfile, read_hostfile
from ds_core.launcher.selection import SelectedHost, select_hosts

HOSTS = (Host("host1", 4), Host("host2", 4), Host("host3", 2))


def selected(**options: object) -> list[str]:
    """Each selected host as `name:slots`, with a star where slots are devices."""
    return [
        f"{host.name}:{','.join(map(str, host.slots))}{'*' if host.has_named_slots else ''}"
        for host in select_hosts(HOSTS, **options)  # type: ignore[arg-type]
    ]


def test_hosts_are_read_in_order_without_comments_and_blank_lines() -> None:
    text = "# head\n\nhost1 slots=4\n  10.0.0.2\tslots = 8  # big\r\nnode-3.lan slots=1\n"

    assert parse_hostfile(text, "hosts") == (
        Host("host1", 4),
        Host("10.0.0.2", 8),
        Host("node-3.lan", 1),
    )


def test_every_mistake_is_named_with_its_line() -> None:
    text = "host1 slots=4\nhost2\nhost1 slots=2\n-oProxy slots=1\nhost3 slots=0\nhost4 slots=x 3\n"

    with pytest.raises(LaunchError) as error:
        parse_hostfile(text, "hosts")

    lines = str(error.value).splitlines()
    assert lines[0] == "--hostfile: hosts has mistakes:"
    assert lines[1] == "line 2: got 'host2', expected `HOST slots=N`"
    assert lines[2].startswith("line 3: host1 is on line 1 already")
    assert lines[3].startswith("line 4: got host '-oProxy'")
    assert lines[4] == "line 5: got slots=0, expected a number of at least 1"
    assert lines[5].startswith("line 6: got 'host4 slots=x 3'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "cannot be read: No such file", id="missing"),
        pytest.param(b"# nothing\n", "names no host", id="empty"),
        pytest.param(b"\xff\xfe", "cannot be read: is not text", id="binary"),
    ],
)
def test_hostfile_without_hosts_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "hosts"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(LaunchError, match=message):
        read_hostfile(path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, ["host1:0,1,2,3", "host2:0,1,2,3", "host3:0,1"], id="all"),
        pytest.param({"include": "host2"}, ["host2:0,1,2,3"], id="one-host"),
        pytest.param(
            {"include": "host3@host1:2,0"}, ["host1:0,2*", "host3:0,1"], id="order-of-the-file"
        ),
        pytest.param({"include": "host1:1-3"}, ["host1:1,2,3*"], id="range"),
        pytest.param(
            {"exclude": "host2@host1:0,3"}, ["host1:1,2*", "host3:0,1"], id="exclude-slots"
        ),
        pytest.param({"exclude": "host1:0-3@host2"}, ["host3:0,1"], id="exclude-all-slots"),
        pytest.param({"num_nodes": 2}, ["host1:0,1,2,3", "host2:0,1,2,3"], id="first-hosts"),
        pytest.param({"nproc": 1}, ["host1:0", "host2:0", "host3:0"], id="first-slots"),
        pytest.param({"include": "host1:2,3", "nproc": 1}, ["host1:2*"], id="first-named-slot"),
    ],
)
def test_filter_selects(options: dict[str, object], expected: list[str]) -> None:
    assert selected(**options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"include": "host9"},
            "--include: 'host9' is not in the hostfile, which has host1, host2, host3; did you "
            "mean host",
            id="unknown",
        ),
        pytest.param({"include": "host1:4"}, "host1 has slots 0 to 3 by the hostfile", id="slot"),
        pytest.param({"include": "host1:3-1"}, "host1 has slots 0 to 3", id="reversed-range"),
        pytest.param({"include": "host1:a"}, "got slots 'a' of host1, expected", id="no-number"),
        pytest.param({"include": "host1:"}, "got slots '' of host1, expected", id="no-slots"),
        pytest.param({"include": "host1:1,0-2"}, "slot 1 of host1 appears twice", id="slot-twice"),
        pytest.param({"include": "host1@host1:1"}, "host1 appears twice", id="host-twice"),
        pytest.param({"include": ""}, r"expected HOST\[:SLOTS\] joined by @", id="empty"),
        pytest.param({"exclude": "host1@host2@host3"}, "leaves no host", id="nothing-left"),
        pytest.param({"include": "host1", "exclude": "host2"}, "exclude each other", id="both"),
        pytest.param({"num_nodes": 4}, "--num-nodes: got 4, expected 1 to 3", id="too-many-nodes"),
        pytest.param({"nproc": 3}, "--nproc: got 3, but host3 has 2 slots", id="too-many-procs"),
    ],
)
def test_impossible_filter_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        selected(**options)


def test_whole_host_and_named_slots_differ() -> None:
    (whole,) = select_hosts(HOSTS, include="host3")
    (named,) = select_hosts(HOSTS, include="host3:0,1")

    assert whole == SelectedHost("host3", (0, 1))
    assert named == SelectedHost("host3", (0, 1), has_named_slots=True)
