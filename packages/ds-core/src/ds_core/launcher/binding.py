"""Which cores each local rank runs on, and from which NUMA node it takes memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_core.errors import LaunchError

_SYSTEM = Path("/sys/devices/system")
#: The program that a bound rank starts as; it binds itself and becomes the rank's own program.
_SHIM = Path(__file__).with_name("bound_rank.py")


@dataclass(frozen=True)
class Topology:
    """The cores that may be used.

    `nodes`: for each NUMA node its cores; a core is the tuple of its hardware threads (logical
    processors).
    """

    nodes: Mapping[int, tuple[tuple[int, ...], ...]]

    @property
    def num_cores(self) -> int:
        return sum(len(cores) for cores in self.nodes.values())


@dataclass(frozen=True)
class RankCores:
    """What one local rank gets: logical processors, threads to compute with, NUMA nodes."""

    processors: tuple[int, ...]
    num_threads: int
    nodes: tuple[int, ...]


def read_topology(allowed: set[int], system: Path = _SYSTEM) -> Topology:
    """The cores of this machine, as far as their logical processors are in `allowed`."""
    nodes: dict[int, tuple[tuple[int, ...], ...]] = {}
    seen: set[int] = set()
    folders = sorted((system / "node").glob("node[0-9]*"), key=lambda f: int(f.name[4:]))
    for folder in folders:
        processors = set(parse_cores((folder / "cpulist").read_text().strip())) & allowed
        if processors:
            nodes[int(folder.name[4:])] = _cores(processors, system)
            seen |= processors
    if allowed - seen:  # a system without NUMA nodes
        nodes[min(nodes, default=0)] = (*nodes.get(0, ()), *_cores(allowed - seen, system))
    return Topology(nodes)


def parse_cores(text: str) -> tuple[int, ...]:
    """Numbers of a list such as `0-3,8`. Raises LaunchError for anything else."""
    numbers: list[int] = []
    for word in filter(None, text.split(",")):
        first, dash, last = word.strip().partition("-")
        is_range = first.isdecimal() and (last.isdecimal() if dash else True)
        named = range(int(first), int(last or first) + 1) if is_range else ()
        if not named:
            raise LaunchError(
                f"--bind-cores: got {text!r}, expected auto, or numbers and ranges joined by "
                "commas, such as 0-15,32-47"
            )
        numbers.extend(named)
    return tuple(numbers)


def bind_cores(
    asked: str, nproc: int, allowed: set[int], system: Path = _SYSTEM
) -> list[RankCores]:
    """The share of each local rank.

    Ranks are dealt to NUMA nodes in proportion to their cores, consecutive ranks to one node, so
    that a rank's cores and memory are on one node wherever there are at least as many ranks as
    nodes. A core's hardware threads stay together.

    Args:
        asked: "auto": all cores that this process may use; else a list such as `0-15,32-47`.
        nproc: local ranks.
        allowed: logical processors that this process may use.
        system: where Linux describes processors and nodes.

    Raises LaunchError if the list names others, or there are fewer cores than ranks.
    """
    chosen = set(allowed) if asked == "auto" else set(parse_cores(asked))
    if not chosen or not chosen <= allowed:
        raise LaunchError(
            f"--bind-cores: got {asked}, but this process may use {format_cores(sorted(allowed))}"
        )
    topology = read_topology(chosen, system)
    if topology.num_cores < nproc:
        raise LaunchError(
            f"--bind-cores: {nproc} processes need at least as many cores, {asked} comes to "
            f"{topology.num_cores}; lower --nproc or leave --bind-cores out"
        )
    flat = [(node, core) for node, cores in topology.nodes.items() for core in cores]
    if nproc >= len(topology.nodes):
        shares = _within_nodes(topology, nproc)
    else:
        shares = [_slice(flat, rank, nproc) for rank in range(nproc)]
    return [_rank_cores(share) for share in shares]


def bound_command(
    command: Sequence[str], shares: Sequence[RankCores], *, keeps_threads: bool, sets_memory: bool
) -> tuple[str, ...]:
    """The command that binds itself to its local rank's share and goes on as `command`.

    Args:
        command: what each rank runs.
        shares: by local rank.
        keeps_threads: leave OMP_NUM_THREADS alone, because the user set it.
        sets_memory: have numactl prefer the memory of the share's NUMA node.
    """
    words = [sys.executable, "-I", "-S", str(_SHIM)]
    for share in shares:
        threads = "" if keeps_threads else str(share.num_threads)
        # A share across nodes takes memory where it runs, which is what the kernel does.
        node = str(share.nodes[0]) if len(share.nodes) == 1 and sets_memory else ""
        words.append(f"{format_cores(share.processors)}/{threads}/{node}")
    return (*words, "--", *command)


def can_set_memory() -> bool:
    """Whether numactl is installed, and allowed to set a memory policy (containers may forbid)."""
    program = shutil.which("numactl")
    if program is None:
        return False
    trial = subprocess.run([program, "--localalloc", "true"], capture_output=True, check=False)
    return trial.returncode == 0


def format_cores(numbers: Sequence[int]) -> str:
    """Numbers as a list with ranges: (0, 1, 2, 8) is `0-2,8`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _cores(processors: set[int], system: Path) -> tuple[tuple[int, ...], ...]:
    """Logical processors grouped by the core that they share."""
    cores = set()
    for processor in processors:
        path = system / f"cpu/cpu{processor}/topology/thread_siblings_list"
        siblings = set(parse_cores(path.read_text().strip())) if path.is_file() else {processor}
        cores.add(tuple(sorted(siblings & processors)))
    return tuple(sorted(cores))


def _within_nodes(topology: Topology, nproc: int) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Shares that never cross a NUMA node; at least one rank per node, at most one per core."""
    sizes = {node: len(cores) for node, cores in topology.nodes.items()}
    ranks = dict.fromkeys(sizes, 1)
    for _ in range(nproc - len(sizes)):
        # The next rank goes where the cores per rank are most.
        node = max(sizes, key=lambda n: (sizes[n] / (ranks[n] + 1), -n))
        ranks[node] += 1
    shares = []
    for node, cores in topology.nodes.items():
        own = [(node, core) for core in cores]
        shares += [_slice(own, rank, ranks[node]) for rank in range(ranks[node])]
    return shares


def _slice(
    cores: Sequence[tuple[int, tuple[int, ...]]], index: int, num_parts: int
) -> list[tuple[int, tuple[int, ...]]]:
    """One of `num_parts` consecutive parts whose lengths differ by at most one."""
    return list(cores[len(cores) * index // num_parts : len(cores) * (index + 1) // num_parts])


def _rank_cores(share: Sequence[tuple[int, tuple[int, ...]]]) -> RankCores:
    processors = sorted(processor for _, core in share for processor in core)
    return RankCores(tuple(processors), len(share), tuple(sorted({node for node, _ in share})))
