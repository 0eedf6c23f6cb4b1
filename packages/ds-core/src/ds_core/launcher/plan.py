"""What a job is: what the user asked for, and what follows from it on this machine."""

from __future__ import annotations

import difflib
import importlib.machinery
import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ds_core import _env
from ds_core.errors import LaunchError
from ds_core.launcher import binding, devices
from ds_core.launcher.environment import Setting, find_env_file, user_settings
from ds_core.launcher.manager_variables import resolve_endpoint, resolve_node_rank

#: Origin of an OMP_NUM_THREADS that nobody chose.
SHARED_OUT = "ds run (an equal share of the cores)"
#: Longest time limit: the system's timers take no infinity.
_LONGEST_S = 1e9
Show = Literal["node", "job", "all"]


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
            "auto": what Slurm, MPI or Kubernetes says.
        rdzv_endpoint: "host:port" where nodes meet. Needed with more than one node. "auto" or
            "auto:PORT": the first host, as Slurm or Kubernetes names it.
        rdzv_conf: further settings of the rendezvous, such as `("timeout", "60")`.
        local_addr: address of this node for the others. None: what its host name means.
        devices: numbers of the devices that processes on this node see. None: all.
        bind_cores: give each process cores of its own: "auto", or a list such as "0-15,32-47".
        env: variables to set, as "NAME=VALUE", or "NAME" for its value here.
        env_file: file of further variables. None: `.ds_env` or `.deepspeed_env` of the current
            or home folder, if there is one.
        reads_env_file: whether to read an env file at all.
        max_restarts: how often to start all processes again after a failure.
        min_nproc: after a failure start one process fewer, without the one that failed first and
            its device, as long as so many are left. None: always as many.
        log_dir: folder for the output of every rank. None: a temporary one, kept on failure.
        show: whose output appears here: the first process of this "node", of the "job", or that
            of "all" processes of this node, each line with its rank.
        timeout_s: seconds after which the job is ended. None: no limit.
        is_module: run `script` as `python -m script`.
        with_python: whether Python runs `script`; if not, it is executed itself.
    """

    script: str
    args: tuple[str, ...] = ()
    nproc: int | Literal["auto"] = "auto"
    nnodes: int | str = 1
    node_rank: int | Literal["auto"] | None = None
    rdzv_endpoint: str | None = None
    rdzv_conf: tuple[tuple[str, str], ...] = ()
    local_addr: str | None = None
    devices: tuple[int, ...] | None = None
    bind_cores: str | None = None
    env: tuple[str, ...] = ()
    env_file: str | None = None
    reads_env_file: bool = True
    max_restarts: int = 0
    min_nproc: int | None = None
    log_dir: str | None = None
    show: Show = "node"
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
    conf: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """A job as it will run: checked, with nothing left to decide.

    Attributes:
        command: what each process runs, through the program that binds it to cores if any.
        settings: what is set in the environment of every process beyond what it inherits, by
            name, with where each comes from. OMP_NUM_THREADS is among them if it is shared out.
        cores: what each local rank is bound to; empty without binding.
        min_nproc: with how few processes a job on this node may go on after failures.
    """

    command: tuple[str, ...]
    nproc: int
    min_nodes: int
    max_nodes: int
    rendezvous: Rendezvous
    settings: Mapping[str, Setting]
    cores: tuple[binding.RankCores, ...]
    max_restarts: int
    min_nproc: int | None
    log_dir: str | None
    show: Show
    timeout_s: float | None

    @property
    def omp_num_threads(self) -> int | None:
        """Threads per process that this launcher decides; None if it leaves them alone."""
        setting = self.settings.get("OMP_NUM_THREADS")
        is_ours = setting is not None and setting.origin == SHARED_OUT
        return int(setting.value) if setting is not None and is_ours else None

    def describe(self) -> str:
        """The command and the environment of each process of this node, one line per process."""
        lines = [f"# {self.torchrun_command()}"]
        if self.min_nproc is not None:
            lines.append(
                f"# after a failure: without the process that failed, and then the next, down to "
                f"{self.min_nproc} (torchrun would keep {self.nproc})"
            )
        for local_rank, share in enumerate(self.cores):
            lines.append(
                f"# local rank {local_rank}: cores {binding.format_cores(share.processors)}, "
                f"NUMA node {binding.format_cores(share.nodes)}, {share.num_threads} threads"
            )
        for local_rank in range(self.nproc):
            variables = " ".join(f"{k}={_word(v)}" for k, v in self.environ(local_rank).items())
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
        return variables | {name: setting.value for name, setting in self.settings.items()}

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
        if self.cores:  # torchrun knows no binding to cores
            rest = rest[rest.index("--") + 1 :]
        if rest[:2] == [sys.executable, "-u"]:
            rest = rest[2:]
        else:
            words.append("--no-python")
        return shlex.join([*words, *rest])


def make_plan(spec: LaunchSpec) -> LaunchPlan:
    """What `spec` comes to on this machine. Raises LaunchError for what cannot be started."""
    check_limits(spec)
    environment = _env.whole()
    settings = job_settings(spec, environment)
    nproc = _num_processes(spec, settings)
    min_nodes, max_nodes = num_nodes(spec.nnodes)
    _check_min_nproc(spec, nproc, max_nodes)
    keeps_threads = "OMP_NUM_THREADS" in environment or "OMP_NUM_THREADS" in settings
    command = _command(spec)
    cores: tuple[binding.RankCores, ...] = ()
    if spec.bind_cores is not None:
        command, cores = _bound(command, spec.bind_cores, nproc, keeps_threads)
    elif nproc > 1 and not keeps_threads:
        # An equal share of the cores; one process may have all of them.
        share = max(1, num_cores() // nproc)
        settings["OMP_NUM_THREADS"] = Setting(str(share), SHARED_OUT)
    return LaunchPlan(
        command=command,
        nproc=nproc,
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        rendezvous=_rendezvous(spec, min_nodes, max_nodes, environment),
        settings=settings,
        cores=cores,
        max_restarts=spec.max_restarts,
        min_nproc=spec.min_nproc,
        log_dir=spec.log_dir,
        show=spec.show,
        timeout_s=spec.timeout_s,
    )


def without_process(spec: LaunchSpec, plan: LaunchPlan, local_rank: int) -> LaunchSpec:
    """What to start after an attempt in which a process failed first: all the others.

    The device of that process is left out where each had one that `ds run` knows of: those of
    `--devices`, or all that are visible. As many as before if `min_nproc` allows no fewer.
    """
    if plan.min_nproc is None or plan.nproc <= plan.min_nproc:
        return replace(spec, nproc=plan.nproc)
    in_use = spec.devices
    is_chosen_elsewhere = devices.visible_variable() in {**_env.whole(), **plan.settings}
    if in_use is None and not is_chosen_elsewhere and devices.num_devices() >= plan.nproc:
        in_use = tuple(range(plan.nproc))
    if in_use is not None and len(in_use) == plan.nproc:
        in_use = in_use[:local_rank] + in_use[local_rank + 1 :]
    return replace(
        spec,
        nproc=plan.nproc - 1,
        devices=in_use,
        min_nproc=plan.min_nproc,
    )


def _check_min_nproc(spec: LaunchSpec, nproc: int, max_nodes: int) -> None:
    if spec.min_nproc is None:
        return
    if max_nodes > 1:
        raise LaunchError(
            "--min-nproc: is for a job on one node; one on several goes on with fewer of them: "
            "give --nnodes MIN:MAX"
        )
    if not 1 <= spec.min_nproc <= nproc:
        raise LaunchError(
            f"--min-nproc: got {spec.min_nproc}, expected 1 to the number of processes, {nproc}"
        )
    if spec.max_restarts == 0:
        raise LaunchError("--min-nproc: nothing is started again without --max-restarts N")


def check_limits(spec: LaunchSpec) -> None:
    """Raises LaunchError for a number or folder that no job can have."""
    if spec.max_restarts < 0:
        raise LaunchError(f"--max-restarts: got {spec.max_restarts}, expected 0 or more")
    if spec.timeout_s is not None and not 0 < spec.timeout_s <= _LONGEST_S:
        raise LaunchError(
            f"--timeout-s: got {spec.timeout_s}, expected a number above 0, at most {_LONGEST_S:g}"
        )
    if spec.log_dir is not None and Path(spec.log_dir).exists() and not Path(spec.log_dir).is_dir():
        raise LaunchError(f"--log-dir: {spec.log_dir} exists and is not a folder")


def job_settings(spec: LaunchSpec, environment: Mapping[str, str]) -> dict[str, Setting]:
    """Variables that the job gets beyond `environment`, in order of precedence.

    Raises LaunchError if devices are asked for while the variable for them says otherwise.
    """
    settings = user_settings(spec.env, env_file_of(spec), environment)
    if spec.devices is not None:
        variable = devices.visible_variable()
        present = settings[variable].value if variable in settings else environment.get(variable)
        value = devices.check_devices(spec.devices, variable, present)
        settings[variable] = Setting(value, "ds run (--devices)")
    return settings


def env_file_of(spec: LaunchSpec) -> Path | None:
    """The env file that counts for a job."""
    if not spec.reads_env_file:
        return None
    named = spec.env_file or _env.env_file()
    return Path(named) if named else find_env_file(Path.cwd(), Path.home())


def _num_processes(spec: LaunchSpec, settings: Mapping[str, Setting]) -> int:
    if spec.nproc != "auto":
        if spec.nproc < 1:
            raise LaunchError(
                f"--nproc: got {spec.nproc}, expected a number of at least 1, or auto"
            )
        return spec.nproc
    if spec.devices is not None:
        return len(spec.devices)
    present = devices.num_devices()
    if present == 0:
        return 1
    setting = settings.get(devices.visible_variable())
    return present if setting is None else devices.num_visible(setting.value) or 1


def _bound(
    command: tuple[str, ...], asked: str, nproc: int, keeps_threads: bool
) -> tuple[tuple[str, ...], tuple[binding.RankCores, ...]]:
    affinity: Any = getattr(os, "sched_getaffinity", None)
    if affinity is None:
        raise LaunchError("--bind-cores: this system cannot bind processes to cores; leave it out")
    shares = binding.bind_cores(asked, nproc, affinity(0))
    bound = binding.bound_command(
        command, shares, keeps_threads=keeps_threads, sets_memory=binding.can_set_memory()
    )
    return bound, tuple(shares)


def num_nodes(nnodes: int | str) -> tuple[int, int]:
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


def _rendezvous(
    spec: LaunchSpec, min_nodes: int, max_nodes: int, environment: Mapping[str, str]
) -> Rendezvous:
    node_rank = spec.node_rank
    if node_rank == "auto":
        node_rank = resolve_node_rank(environment, max_nodes) if max_nodes > 1 else None
    if max_nodes == 1:
        if node_rank not in (None, 0):
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
                conf=spec.rdzv_conf,
            )
    if spec.rdzv_endpoint is None:
        raise LaunchError(
            f"--rdzv-endpoint: {max_nodes} nodes need a host:port at which they meet, "
            "the same on all of them (a host and a free port of the first node)"
        )
    endpoint = resolve_endpoint(spec.rdzv_endpoint, environment)
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise LaunchError(f"--rdzv-endpoint: got {endpoint!r}, expected host:port")
    if node_rank is None:
        return Rendezvous(
            backend="c10d",
            endpoint=endpoint,
            run_id="ds-run",
            local_addr=spec.local_addr,
            conf=spec.rdzv_conf,
        )
    if min_nodes != max_nodes:
        raise LaunchError(
            f"--node-rank: numbering nodes by hand needs a fixed number of them, got {spec.nnodes}"
        )
    if not 0 <= node_rank < max_nodes:
        raise LaunchError(
            f"--node-rank: got {node_rank}, expected 0 to {max_nodes - 1} with {max_nodes} nodes"
        )
    return Rendezvous(
        backend="static",
        endpoint=endpoint,
        run_id="ds-run",
        node_rank=node_rank,
        local_addr=spec.local_addr,
        conf=spec.rdzv_conf,
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


def num_cores() -> int:
    """Cores that this process may use."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _word(text: str) -> str:
    """A value as a shell reads it; what is decided later stays readable."""
    return text if text.startswith("<") else shlex.quote(text)
