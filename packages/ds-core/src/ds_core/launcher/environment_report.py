"""The environment that a job would get here: where it comes from, and what is wrong in it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from ds_core import _env
from ds_core.launcher.devices import VISIBLE_VARIABLES, num_visible
from ds_core.launcher.environment import forwarded, is_secret
from ds_core.launcher.manager_variables import NODE_RANK_VARIABLES
from ds_core.launcher.plan import LaunchPlan, LaunchSpec, env_file_of, make_plan, num_cores

#: Variables that torchrun's agent sets for each process, whatever was set before.
TORCHRUN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
#: Beginnings of the names that concern a job, next to those that are forwarded.
_CONCERNED = ("SLURM_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "PET_", "JOB_COMPLETION_INDEX")
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Variable:
    """A variable of the first process, its value there, and where it comes from."""

    name: str
    value: str
    origin: str


@dataclass(frozen=True)
class EnvironmentReport:
    """What the first process of a job would find, and what is wrong or surprising."""

    variables: tuple[Variable, ...]
    env_file: str | None
    problems: tuple[str, ...]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def report_environment(spec: LaunchSpec) -> EnvironmentReport:
    """The report for a job as `spec` describes it. Raises LaunchError if it cannot be started."""
    environment = _env.whole()
    plan = make_plan(spec)
    env_file = env_file_of(spec)
    return EnvironmentReport(
        variables=_variables(plan, environment),
        env_file=None if env_file is None else str(env_file),
        problems=tuple(find_problems(environment, plan)),
    )


def find_problems(environment: Mapping[str, str], plan: LaunchPlan) -> list[str]:
    """What in the environment is wrong for a job, each with what to do."""
    job = {**environment, **{name: setting.value for name, setting in plan.settings.items()}}
    checks: tuple[Callable[[Mapping[str, str], LaunchPlan], list[str]], ...] = (
        _leftover_world,
        _master_port,
        _visible_devices,
        _managers,
        _threads,
        _interfaces,
    )
    return [problem for check in checks for problem in check(job, plan)]


def _variables(plan: LaunchPlan, environment: Mapping[str, str]) -> tuple[Variable, ...]:
    first = plan.environ(0)
    found = []
    for name in TORCHRUN_VARIABLES:
        origin = "ds run"
        if name in environment:
            origin += f" (instead of {environment[name]!r} in this shell)"
        found.append(Variable(name, first[name], origin))
    for name, setting in sorted(plan.settings.items()):
        origin = setting.origin
        if name in environment and environment[name] != setting.value:
            instead = _without_secret(name, repr(environment[name]))
            origin += f" (instead of {instead} in this shell)"
        found.append(Variable(name, _without_secret(name, setting.value), origin))
    named = set(first)
    travelling = forwarded(environment)
    visible = set(VISIBLE_VARIABLES.values())
    for name, value in sorted(environment.items()):
        if name in named or not (
            name in travelling or name in visible or name.startswith((*_CONCERNED, "DS_"))
        ):
            continue
        origin = _manager_of(name) or "this shell"
        if name in travelling:
            origin += ", also sent to other hosts"
        found.append(Variable(name, _without_secret(name, value), origin))
    return tuple(found)


def _manager_of(name: str) -> str:
    prefixes = {
        "SLURM_": "Slurm",
        "OMPI_COMM_WORLD_": "Open MPI",
        "PMIX_": "PMIx",
        "PMI_": "MPI",
        "PET_": "Kubernetes' training operator",
        "JOB_COMPLETION_INDEX": "Kubernetes",
    }
    return next((m for prefix, m in prefixes.items() if name.startswith(prefix)), "")


def _without_secret(name: str, value: str) -> str:
    return "(hidden)" if is_secret(name) else value


def _leftover_world(job: Mapping[str, str], plan: LaunchPlan) -> list[str]:
    """torchrun's variables in the shell of the user, which `python train.py` would believe."""
    names = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name in job]
    problems = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name in job and not job[name].isdecimal():
            problems.append(f"{name}={job[name]!r} is not a number; `unset {name}`")
    rank, size = job.get("RANK", ""), job.get("WORLD_SIZE", "")
    if rank.isdecimal() and size.isdecimal() and int(rank) >= int(size):
        problems.append(
            f"RANK={rank} is outside 0..WORLD_SIZE-1 with WORLD_SIZE={size}; unset both"
        )
    world = [name for name in names if name in ("RANK", "WORLD_SIZE")]
    missing = [n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in names]
    if world and missing:
        problems.append(
            f"{', '.join(names)} set, but not {', '.join(missing)}: `ds run` sets all of them, yet "
            f"a script started without it fails; `unset {' '.join(names)}`"
        )
    elif world:
        problems.append(
            f"this shell says RANK={rank} of WORLD_SIZE={size}: `ds run` sets its own, yet a "
            f"script started without it waits for the other ranks; `unset {' '.join(names)}`"
        )
    return problems


def _master_port(job: Mapping[str, str], plan: LaunchPlan) -> list[str]:
    endpoint = plan.rendezvous.endpoint
    host, _, port = endpoint.rpartition(":")
    problems = []
    value = job.get("MASTER_PORT")
    if value is not None and not (value.isdecimal() and 0 < int(value) < 2**16):
        problems.append(f"MASTER_PORT={value!r} is not a port, 1 to 65535; `unset MASTER_PORT`")
    if port != "0" and plan.rendezvous.node_rank in (0, None) and _is_taken(int(port)):
        problems.append(
            f"port {port} of this machine is taken, perhaps by another job; the first node of "
            f"{endpoint} needs it. Choose another with --rdzv-endpoint {host}:PORT"
        )
    return problems


def _is_taken(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def _visible_devices(job: Mapping[str, str], plan: LaunchPlan) -> list[str]:
    problems = []
    for variable in sorted(set(VISIBLE_VARIABLES.values())):
        value = job.get(variable)
        if value is None:
            continue
        words = [word.strip() for word in value.split(",") if word.strip()]
        if not words or words[0] == "-1":
            problems.append(
                f"{variable}={value!r} hides every device; `unset {variable}` to see them"
            )
        elif len(set(words)) < len(words):
            problems.append(f"{variable}={value} names a device twice; the second does not count")
        elif plan.nproc > num_visible(value):
            problems.append(
                f"{variable}={value} leaves {num_visible(value)} devices to {plan.nproc} "
                "processes; lower --nproc, or name more devices"
            )
    cuda, others = job.get("CUDA_VISIBLE_DEVICES"), ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    for other in others:
        if cuda is not None and other in job and job[other] != cuda:
            problems.append(
                f"CUDA_VISIBLE_DEVICES={cuda} and {other}={job[other]} differ, and the one counts "
                f"within what the other leaves; unset one of them"
            )
    return problems


def _managers(job: Mapping[str, str], plan: LaunchPlan) -> list[str]:
    problems = []
    for variable, (manager, size_variable) in NODE_RANK_VARIABLES.items():
        size = job.get(size_variable, "")
        if variable not in job or not size.isdecimal() or int(size) < 2:
            continue
        if int(size) != plan.max_nodes:
            problems.append(
                f"{manager} started {size} tasks ({size_variable}), but the job has "
                f"{plan.max_nodes} node{'s' if plan.max_nodes > 1 else ''}: each task would run "
                f"a job of its own. Start one task per node, and give --nnodes {size} "
                "--node-rank auto --rdzv-endpoint auto"
            )
    return problems


def _threads(job: Mapping[str, str], plan: LaunchPlan) -> list[str]:
    value = job.get("OMP_NUM_THREADS", "")
    if value and not value.isdecimal():
        return [f"OMP_NUM_THREADS={value!r} is not a number; `unset OMP_NUM_THREADS`"]
    if value and int(value) * plan.nproc > num_cores():
        return [
            f"OMP_NUM_THREADS={value} for each of {plan.nproc} processes is more than the "
            f"{num_cores()} cores here; unset it, and `ds run` shares them out"
        ]
    return []


def _interfaces(job: Mapping[str, str], plan: LaunchPlan) -> list[str]:
    present = [name for _, name in socket.if_nameindex()]
    problems = []
    for variable in _INTERFACE_VARIABLES:
        value = job.get(variable, "")
        if not value or value.startswith("^"):
            continue
        is_exact = value.startswith("=") or variable == "GLOO_SOCKET_IFNAME"
        for word in re.split(r"[,:]", value.lstrip("=")):
            fits = [n for n in present if n == word or (not is_exact and n.startswith(word))]
            if not fits:
                problems.append(
                    f"{variable}={value}: no network interface {word} here, but "
                    f"{', '.join(present)}"
                )
    return problems
