"""What a job is: what the user asked for, and what follows from it on this machine."""

from __future__ import annotations

import difflib
import importlib.machinery
import os
import shlex
import shutil
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ds_core import _env
from ds_core.errors import LaunchError


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """A job as the user asks for it.

    Attributes:
        script: path of a Python file; a module name if `is_module`; a program if not
            `with_python`.
        args: its arguments, handed on untouched.
        nproc: processes on this node. "auto": one per accelerator, or one without any.
        nnodes: number of nodes, or "MIN:MAX" for an elastic job.
        node_rank: this node's number, if nodes are numbered by hand; node 0 hosts the endpoint.
        rdzv_endpoint: "host:port" where nodes meet. Needed with more than one node.
        max_restarts: how often to start all processes again after a failure.
        log_dir: folder for the output of every rank. None: a temporary one, kept on failure.
        timeout_s: seconds after which the job is ended. None: no limit.
        is_module: run `script` as `python -m script`.
        with_python: whether Python runs `script`; if not, it is executed itself.
    """

    script: str
    args: tuple[str, ...] = ()
    nproc: int | Literal["auto"] = "auto"
    nnodes: int | str = 1
    node_rank: int | None = None
    rdzv_endpoint: str | None = None
    max_restarts: int = 0
    log_dir: str | None = None
    timeout_s: float | None = None
    is_module: bool = False
    with_python: bool = True


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """How the agents of a job's nodes find each other, in torchrun's words."""

    backend: Literal["c10d", "static"]
    endpoint: str
    run_id: str
    node_rank: int | None = None
    local_addr: str | None = None


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """A job as it will run: checked, with nothing left to decide.

    `omp_num_threads` is what this launcher sets, or None if it leaves the variable alone.
    """

    command: tuple[str, ...]
    nproc: int
    min_nodes: int
    max_nodes: int
    rendezvous: Rendezvous
    omp_num_threads: int | None
    max_restarts: int
    log_dir: str | None
    timeout_s: float | None

    def describe(self) -> str:
        """The command and the environment of each process of this node, one line per process."""
        lines = [f"# {self.torchrun_command()}"]
        for local_rank in range(self.nproc):
            variables = " ".join(f"{k}={v}" for k, v in self.environ(local_rank).items())
            lines.append(f"{variables} {shlex.join(self.command)}")
        return "\n".join(lines)

    def environ(self, local_rank: int) -> dict[str, str]:
        """What is added to the environment of one process, as far as it is known beforehand.

        A value in angle brackets is decided when all nodes have met.
        """
        node_rank = 0 if self.max_nodes == 1 else self.rendezvous.node_rank
        known = node_rank is not None
        world_size = str(self.nproc * self.max_nodes)
        host, _, port = self.rendezvous.endpoint.rpartition(":")
        is_static = self.rendezvous.backend == "static"
        variables = {
            "RANK": str((node_rank or 0) * self.nproc + local_rank) if known else "<rank>",
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": str(node_rank) if known else "<node>",
            "WORLD_SIZE": world_size if self.min_nodes == self.max_nodes else "<world size>",
            "LOCAL_WORLD_SIZE": str(self.nproc),
            "MASTER_ADDR": host if is_static or self.max_nodes == 1 else "<host>",
            "MASTER_PORT": port if is_static else "<free port>",
        }
        if self.omp_num_threads is not None:
            variables["OMP_NUM_THREADS"] = str(self.omp_num_threads)
        return variables

    def torchrun_command(self) -> str:
        """The torchrun command that starts the same processes."""
        words = ["torchrun", f"--nproc-per-node={self.nproc}"]
        if self.max_nodes == 1:
            words.append("--standalone")
        elif self.rendezvous.node_rank is not None:
            host, _, port = self.rendezvous.endpoint.rpartition(":")
            words += [f"--nnodes={self.max_nodes}", f"--node-rank={self.rendezvous.node_rank}"]
            words += [f"--master-addr={host}", f"--master-port={port}"]
        else:
            words += [f"--nnodes={self.min_nodes}:{self.max_nodes}", "--rdzv-backend=c10d"]
            words += [f"--rdzv-id={self.rendezvous.run_id}"]
            words += [f"--rdzv-endpoint={self.rendezvous.endpoint}"]
        if self.max_restarts:
            words.append(f"--max-restarts={self.max_restarts}")
        rest = list(self.command)
        if rest[:2] == [sys.executable, "-u"]:
            rest = rest[2:]
        else:
            words.append("--no-python")
        return shlex.join([*words, *rest])


def make_plan(spec: LaunchSpec) -> LaunchPlan:
    """What `spec` comes to on this machine. Raises LaunchError for what cannot be started."""
    nproc = _num_processes(spec.nproc)
    min_nodes, max_nodes = _num_nodes(spec.nnodes)
    if spec.max_restarts < 0:
        raise LaunchError(f"--max-restarts: got {spec.max_restarts}, expected 0 or more")
    if spec.timeout_s is not None and spec.timeout_s <= 0:
        raise LaunchError(f"--timeout-s: got {spec.timeout_s}, expected a number above 0")
    if spec.log_dir is not None and Path(spec.log_dir).exists() and not Path(spec.log_dir).is_dir():
        raise LaunchError(f"--log-dir: {spec.log_dir} exists and is not a folder")
    return LaunchPlan(
        command=_command(spec),
        nproc=nproc,
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        rendezvous=_rendezvous(spec, min_nodes, max_nodes),
        omp_num_threads=_omp_num_threads(nproc),
        max_restarts=spec.max_restarts,
        log_dir=spec.log_dir,
        timeout_s=spec.timeout_s,
    )


def _num_processes(nproc: int | Literal["auto"]) -> int:
    if nproc == "auto":
        import torch

        return torch.accelerator.device_count() or 1
    if nproc < 1:
        raise LaunchError(f"--nproc: got {nproc}, expected a number of at least 1, or auto")
    return nproc


def _num_nodes(nnodes: int | str) -> tuple[int, int]:
    """The least and the greatest number of nodes."""
    first, _, last = str(nnodes).partition(":")
    try:
        least, greatest = int(first), int(last or first)
    except ValueError:
        least, greatest = 0, 0
    if not 1 <= least <= greatest:
        raise LaunchError(
            f"--nnodes: got {nnodes}, expected a number of at least 1, or MIN:MAX of such"
        )
    return least, greatest


def _rendezvous(spec: LaunchSpec, min_nodes: int, max_nodes: int) -> Rendezvous:
    if max_nodes == 1:
        if spec.node_rank not in (None, 0):
            raise LaunchError(
                f"--node-rank: got {spec.node_rank}, but there is one node; give --nnodes"
            )
        if spec.rdzv_endpoint is None:
            # Port 0: the agent binds a free port itself, so two jobs never race for one.
            return Rendezvous(
                backend="c10d",
                endpoint="localhost:0",
                run_id=uuid.uuid4().hex,
                local_addr="localhost",
            )
    if spec.rdzv_endpoint is None:
        raise LaunchError(
            f"--rdzv-endpoint: {max_nodes} nodes need a host:port at which they meet, "
            "the same on all of them (a host and a free port of the first node)"
        )
    host, _, port = spec.rdzv_endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise LaunchError(f"--rdzv-endpoint: got {spec.rdzv_endpoint!r}, expected host:port")
    if spec.node_rank is None:
        return Rendezvous(backend="c10d", endpoint=spec.rdzv_endpoint, run_id="ds-run")
    if min_nodes != max_nodes:
        raise LaunchError(
            f"--node-rank: numbering nodes by hand needs a fixed number of them, got {spec.nnodes}"
        )
    if not 0 <= spec.node_rank < max_nodes:
        raise LaunchError(
            f"--node-rank: got {spec.node_rank}, expected 0 to {max_nodes - 1} "
            f"with {max_nodes} nodes"
        )
    return Rendezvous(
        backend="static",
        endpoint=spec.rdzv_endpoint,
        run_id="ds-run",
        node_rank=spec.node_rank,
    )


def _command(spec: LaunchSpec) -> tuple[str, ...]:
    if spec.is_module and not spec.with_python:
        raise LaunchError("--module and --no-python exclude each other: a module needs Python")
    if not spec.with_python:
        return (_program(spec.script), *spec.args)
    # -u: what a rank prints is in its log when it dies.
    if spec.is_module:
        _check_module(spec.script)
        return (sys.executable, "-u", "-m", spec.script, *spec.args)
    _check_script(Path(spec.script))
    return (sys.executable, "-u", spec.script, *spec.args)


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise LaunchError(f"{name}: no such program, or not executable")
    return found


def _check_script(path: Path) -> None:
    if not path.exists():
        raise LaunchError(f"{path}: no such file in {Path.cwd()}{_nearest(path)}")
    if path.is_dir() and not (path / "__main__.py").is_file():
        raise LaunchError(f"{path}: is a folder without a __main__.py; name a Python file")
    if not os.access(path, os.R_OK):
        raise LaunchError(f"{path}: may not be read by this user; change its permissions")


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = [entry.name for entry in path.parent.glob("*.py")]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _check_module(name: str) -> None:
    """Check that the top package of a module exists, without importing it."""
    top = name.partition(".")[0]
    folders = [os.getcwd(), *sys.path]
    if top in sys.builtin_module_names:
        return
    if importlib.machinery.PathFinder.find_spec(top, folders) is None:
        raise LaunchError(f"{name}: no module {top} in {os.getcwd()} or among what is installed")


def _omp_num_threads(nproc: int) -> int | None:
    """An equal share of this machine's cores, unless the user chose, or one process has all."""
    if nproc == 1 or _env.user_set_threads():
        return None
    return max(1, num_cores() // nproc)


def num_cores() -> int:
    """Cores that this process may use."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
