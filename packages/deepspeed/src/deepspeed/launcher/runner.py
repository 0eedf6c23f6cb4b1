"""The command `deepspeed`: the original's flags, done by `ds run`.

    deepspeed --num_gpus 2 train.py --deepspeed --deepspeed_config ds_config.json

`main` translates the flags into the words of `ds run` and runs it; `ds run --help` tells what it
can do besides. Every rank's output appears here, each line with its rank.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from deepspeed._errors import NotProvidedError
from deepspeed._names import names_of
from ds_core.errors import LaunchError
from ds_core.launcher.devices import num_devices
from ds_core.launcher.hostfile import Host, read_hostfile
from ds_core.launcher.selection import SelectedHost, select_hosts

DLTS_HOSTFILE = "/job/hostfile"
#: Name of the file of variables for all hosts, in the current or home folder.
DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
DEEPSPEED_ENVIRONMENT_PATHS = [str(Path.home()), "."]
_DEFAULT_PORT = 29500

__getattr__, __dir__ = names_of(
    __name__,
    {},
    missing={
        "EXPORT_ENVS": f"name the variables for all hosts in {DEEPSPEED_ENVIRONMENT_NAME}",
        "encode_world_info": "use ds_core.launcher",
        "parse_num_nodes": "use ds_core.launcher",
    },
)

_LAUNCHERS = ("pdsh", "ssh", "slurm", "openmpi", "mpich", "impi", "kubernetes", "ray")


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, by the original's flags."""
    parser = argparse.ArgumentParser(
        prog="deepspeed",
        description="Start a training script in several processes, here or on many hosts.",
        epilog="`ds run` does it; `ds run --help` tells what it can do besides.",
    )
    add = parser.add_argument
    add("-H", "--hostfile", default=DLTS_HOSTFILE, help="lines `HOST slots=N`; none: this machine")
    add("-i", "--include", default="", help="HOST[:SLOT,...][@HOST...]: use these only")
    add("-e", "--exclude", default="", help="use all but these, written alike")
    add("--num_nodes", type=int, default=-1, help="use the first so many hosts of the hostfile")
    add(
        "--num_gpus", "--num_accelerators", type=int, default=-1, help="processes on each host"
    )  # fmt: skip
    add(
        "--master_port", type=int, default=_DEFAULT_PORT, help="where several hosts meet; on one "
        "machine a free port is taken"
    )  # fmt: skip
    add("--master_addr", default="", help="the first host; default: the first of the hostfile")
    add("--node_rank", type=int, default=-1, help="this host's number; needed with --no_ssh")
    add("--launcher", default="", help=f"{', '.join(_LAUNCHERS)}; default: ssh")
    add("--launcher_args", default="", help="further words for the program that it calls")
    add("--module", action="store_true", help="run the script as `python -m`")
    add("--no_python", action="store_true", help="the script is a program")
    add("--no_local_rank", action="store_true", help="do not give the script --local_rank=N")
    add("--no_ssh", action="store_true", help="this command is started on every host by hand")
    add("--no_ssh_check", action="store_true", help="makes no difference")
    add("--force_multi", action="store_true", help="use the launcher for a single host too")
    add("--save_pid", action="store_true", help="write this process's number to /tmp/<pid>.ds")
    add("--enable_each_rank_log", default="None", help="folder for the output of every rank")
    add("--autotuning", default="", choices=["tune", "run"], help="use `ds tune` instead")
    add("user_script", help="script to start, followed by its arguments")
    add("user_args", nargs=argparse.REMAINDER)
    add("--bind_cores_to_rank", action="store_true", help="give each process cores of its own")
    add("--bind_core_list", default=None, help="such as 0-15,32-47: of these cores")
    add("--ssh_port", type=int, default=None, help="port of sshd on the hosts")
    add("--venv_script", default=None, help="script that activates Python on the hosts")
    add(
        "--log_level", default="info", choices=["debug", "info", "warning", "error", "critical"],
        help="makes no difference",
    )  # fmt: skip
    add("-q", "--quiet", action="store_true", help="makes no difference")
    return parser.parse_args(args)


def words_of(args: argparse.Namespace, hosts: Sequence[Host] | None) -> list[str]:
    """The words after `ds run` that do what these flags ask for.

    Args:
        args: what `parse_args` returned.
        hosts: of the hostfile; None: there is none.

    Raises LaunchError for flags that contradict each other, NotProvidedError for what `ds run` does
    not do.
    """
    _check(args, hosts)
    if hosts is None:
        where = _here(args)
    else:
        num_nodes = args.num_nodes if args.num_nodes > 0 else None
        num_gpus = args.num_gpus if args.num_gpus > 0 else None
        chosen = select_hosts(
            hosts,
            include=args.include or None,
            exclude=args.exclude or None,
            num_nodes=num_nodes,
            nproc=num_gpus,
        )
        if args.no_ssh:
            where = _by_hand(args, chosen)
        elif len(chosen) == 1 and not args.force_multi:
            where = _on(chosen[0])
        else:
            where = _on_hosts(args, chosen)
    return [*where, *_for_all(args), *_script(args)]


def _check(args: argparse.Namespace, hosts: Sequence[Host] | None) -> None:
    if args.autotuning:
        raise NotProvidedError(
            f"--autotuning {args.autotuning}: this command does not search; run `ds tune CONFIG`"
        )
    if args.include and args.exclude:
        raise LaunchError("--include and --exclude: give one of them")
    if (args.num_nodes >= 0 or args.num_gpus >= 0) and (args.include or args.exclude):
        raise LaunchError("--num_nodes and --num_gpus cannot be given with --include or --exclude")
    if hosts is None and args.num_nodes > 1:
        raise LaunchError(
            f"--num_nodes: got {args.num_nodes}, but there is no hostfile {args.hostfile}; give "
            f"--hostfile"
        )
    if args.launcher and args.launcher.lower() not in _LAUNCHERS:
        raise LaunchError(
            f"--launcher: got {args.launcher!r}, expected one of {', '.join(_LAUNCHERS)}"
        )


def _here(args: argparse.Namespace) -> list[str]:
    """Processes on this machine, without a hostfile."""
    if args.num_gpus > 0:
        return ["--nproc", str(args.num_gpus)]
    if not (args.include or args.exclude):
        return []
    slots = max(num_devices(), 1)
    text = args.include or args.exclude
    if num_devices() == 0:
        # Slots of a machine without accelerators are processes; as many as are named.
        numbers = [int(word) for word in text.partition(":")[2].split(",") if word.isdecimal()]
        slots = max([slots, *(number + 1 for number in numbers)])
    (host,) = select_hosts(
        [Host("localhost", slots)], include=args.include or None, exclude=args.exclude or None
    )
    return _on(host)


def _on(host: SelectedHost) -> list[str]:
    """One process on this machine for each slot of a host."""
    words = ["--nproc", str(len(host.slots))]
    if host.has_named_slots and num_devices() > 0:
        words += ["--devices", ",".join(map(str, host.slots))]
    return words


def _by_hand(args: argparse.Namespace, hosts: Sequence[SelectedHost]) -> list[str]:
    """This host's part of a job whose command is started on every host."""
    if not 0 <= args.node_rank < len(hosts):
        raise LaunchError(
            f"--node_rank: got {args.node_rank}, expected this host's number, 0 to "
            f"{len(hosts) - 1}, because --no_ssh is given"
        )
    words = _on(hosts[args.node_rank])
    if len(hosts) > 1:
        words += ["--nnodes", str(len(hosts)), "--node-rank", str(args.node_rank)]
        words += ["--rdzv-endpoint", _endpoint(args, hosts)]
    return words


def _on_hosts(args: argparse.Namespace, hosts: Sequence[SelectedHost]) -> list[str]:
    """The hosts of the hostfile, reached by a launcher."""
    words = ["--hostfile", args.hostfile]
    for option, value in (("--include", args.include), ("--exclude", args.exclude)):
        words += [option, value] if value else []
    for option, number in (("--num-nodes", args.num_nodes), ("--nproc", args.num_gpus)):
        words += [option, str(number)] if number > 0 else []
    launcher = args.launcher.lower() or "ssh"
    words += ["--launcher", launcher, "--rdzv-endpoint", _endpoint(args, hosts)]
    if args.launcher_args:
        words.append(f"--launcher-args={args.launcher_args}")
    if args.ssh_port is not None:
        words += ["-O", f"port={args.ssh_port}"]
    if args.venv_script is not None:
        words += ["-O", f"setup=. {args.venv_script}"]
    return words


def _endpoint(args: argparse.Namespace, hosts: Sequence[SelectedHost]) -> str:
    return f"{args.master_addr or hosts[0].name}:{args.master_port}"


def _for_all(args: argparse.Namespace) -> Iterator[str]:
    yield from ("--show", "all")
    if args.enable_each_rank_log != "None":
        yield from ("--log-dir", args.enable_each_rank_log)
    if args.bind_cores_to_rank or args.bind_core_list is not None:
        yield from ("--bind-cores", args.bind_core_list or "auto")


def _script(args: argparse.Namespace) -> list[str]:
    """The script, as it is or through what adds --local_rank."""
    own = [args.user_script, *args.user_args]
    if args.no_local_rank:
        flags = [f for f, on in (("--module", args.module), ("--no-python", args.no_python)) if on]
        return [*flags, *own]
    how = "program" if args.no_python else "module" if args.module else "python"
    return ["--module", "deepspeed.launcher.local_rank", how, *own]


@contextmanager
def _pid_file(is_wanted: bool) -> Iterator[None]:
    """A file that tells who this process is, for programs that started it."""
    if not is_wanted:
        yield
        return
    path = Path(tempfile.gettempdir(), f"{os.getpid()}.ds")
    path.write_text(str(os.getpid()), encoding="utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def fetch_hostfile(hostfile_path: str) -> dict[str, int] | None:
    """Slots by host of a hostfile; None if there is no such file."""
    hosts = _hosts(hostfile_path)
    return None if hosts is None else {host.name: host.slots for host in hosts}


def parse_resource_filter(
    host_info: Mapping[str, Sequence[int]], include_str: str = "", exclude_str: str = ""
) -> dict[str, list[int]]:
    """The slots to use of each host, by the filters of --include and --exclude.

    host_info: slot numbers by host. Raises LaunchError for a filter that names what is not there.
    """
    hosts = [Host(name, len(slots)) for name, slots in host_info.items()]
    chosen = select_hosts(hosts, include=include_str or None, exclude=exclude_str or None)
    return {host.name: list(host.slots) for host in chosen}


def parse_inclusion_exclusion(
    resource_pool: Mapping[str, int], inclusion: str, exclusion: str
) -> dict[str, list[int]]:
    """`parse_resource_filter` of hosts of which the number of slots is given."""
    every = {name: list(range(slots)) for name, slots in resource_pool.items()}
    return parse_resource_filter(every, inclusion, exclusion)


def _hosts(path: str) -> tuple[Host, ...] | None:
    return read_hostfile(Path(path)) if Path(path).is_file() else None


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line, and exit with the code of the process that failed first, else 0."""
    from ds_core.cli import main as ds
    from ds_core.errors import DsError

    given = parse_args(args)
    try:
        words = words_of(given, _hosts(given.hostfile))
        if not given.no_python and not given.module and not Path(given.user_script).is_file():
            raise LaunchError(f"{given.user_script}: there is no such file")
        if given.no_python and shutil.which(given.user_script) is None:
            raise LaunchError(f"{given.user_script}: there is no such program")
    except DsError as error:
        sys.stderr.write(f"deepspeed: {error}\n")
        sys.exit(2)
    with _pid_file(given.save_pid):
        ds(["run", *words])


if __name__ == "__main__":
    main()
