"""Jobs on two hosts: network namespaces with an sshd in each, reached from a third."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")

HOST_1, HOST_2 = "10.77.0.11", "10.77.0.12"


def run_checked(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=30)


def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    programs = [name for name in ("ip", "ssh", "sshd", "ssh-keygen") if not shutil.which(name)]
    if programs:
        return f"needs {', '.join(programs)} (iproute2 and openssh-server)"
    probe = f"dsprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return "" if made.returncode == 0 else "may not make network namespaces here"


@dataclass
class Hosts:
    """Two hosts, and the namespace from which `ds run` reaches them."""

    folder: Path
    head: str
    namespaces: tuple[str, str]
    daemons: list[subprocess.Popen[bytes]]
    jobs: list[subprocess.Popen[str]]

    def command(self, *words: str) -> list[str]:
        start = ["ip", "netns", "exec", self.head, sys.executable, "-m", "ds_core.cli", "run"]
        hosts = ["-H", str(self.folder / "hosts"), f"--launcher-args=-F {self.folder}/ssh_config"]
        return [*start, *hosts, "--env", "GLOO_SOCKET_IFNAME=eth0", *words]

    def start(self, *words: str) -> subprocess.Popen[str]:
        job = subprocess.Popen(
            self.command(*words),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "TMPDIR": str(self.folder),
                "TORCH_CPP_LOG_LEVEL": "ERROR",  # these hosts have no names to warn of
                "PDSH_SSH_ARGS_APPEND": f"-F {self.folder}/ssh_config",
            },
        )
        self.jobs.append(job)
        return job

    def run(self, *words: str) -> tuple[int, str, str]:
        job = self.start(*words)
        out, err = job.communicate(timeout=120)
        return job.returncode, out, err


def add_namespaces(head: str, names: tuple[str, str]) -> None:
    for name in (head, *names):
        run_checked("ip", "netns", "add", name)
        run_checked("ip", "-n", name, "link", "set", "lo", "up")
    run_checked("ip", "-n", head, "link", "add", "bridge", "type", "bridge")
    run_checked("ip", "-n", head, "addr", "add", "10.77.0.1/24", "dev", "bridge")
    run_checked("ip", "-n", head, "link", "set", "bridge", "up")
    for name, address in zip(names, (HOST_1, HOST_2), strict=True):
        port = f"port{address[-1]}"
        peer = ("peer", "name", "eth0", "netns", name)
        run_checked("ip", "-n", head, "link", "add", port, "type", "veth", *peer)
        run_checked("ip", "-n", head, "link", "set", port, "master", "bridge", "up")
        run_checked("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        run_checked("ip", "-n", name, "link", "set", "eth0", "up")


def write_ssh_files(folder: Path) -> None:
    # A home of its own: what the shell of the user starts may print, and two logins may disturb
    # each other, as with pyenv.
    for name in ("host_key", "user_key"):
        run_checked("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        textwrap.dedent(f"""
        HostKey {folder}/host_key
        AuthorizedKeysFile {folder}/authorized_keys
        PermitRootLogin prohibit-password
        StrictModes no
        UsePAM no
        PidFile none
        AcceptEnv TMPDIR
        SetEnv HOME={folder}
        """)
    )
    (folder / "ssh_config").write_text(
        textwrap.dedent(f"""
        Host *
        IdentityFile {folder}/user_key
        StrictHostKeyChecking no
        UserKnownHostsFile /dev/null
        LogLevel ERROR
        SendEnv TMPDIR
        """)
    )
    (folder / "hosts").write_text(f"{HOST_1} slots=1  # the first\n\n{HOST_2} slots=2\n")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    why_not = missing()
    if why_not:
        pytest.skip(why_not)
    folder = tmp_path_factory.mktemp("hosts")
    stem = f"ds{os.getpid()}"
    head, names = f"{stem}-head", (f"{stem}-1", f"{stem}-2")
    daemons: list[subprocess.Popen[bytes]] = []
    jobs: list[subprocess.Popen[str]] = []
    Path("/run/sshd").mkdir(exist_ok=True)
    try:
        add_namespaces(head, names)
        write_ssh_files(folder)
        for name in names:
            sshd = [shutil.which("sshd") or "sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
            daemons.append(
                subprocess.Popen(["ip", "netns", "exec", name, *sshd], stderr=subprocess.DEVNULL)
            )
        found = Hosts(folder, head, names, daemons, jobs)
        wait_until(lambda: all(answers(found, address) for address in (HOST_1, HOST_2)))
        yield found
    finally:
        for job in jobs:
            if job.poll() is None:  # a test has failed
                job.terminate()
                job.communicate(timeout=60)
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(timeout=30)
        for name in (head, *names):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def answers(hosts: Hosts, address: str) -> bool:
    ssh = ["ssh", "-F", f"{hosts.folder}/ssh_config", "-o", "ConnectTimeout=2", address, "true"]
    tried = subprocess.run(
        ["ip", "netns", "exec", hosts.head, *ssh], check=False, capture_output=True, timeout=30
    )
    return tried.returncode == 0


@pytest.fixture
def script(hosts: Hosts) -> Callable[[str], str]:
    """Writes a script into the folder of the job, which both hosts see, and returns its name."""

    def write(source: str) -> str:
        for left in hosts.folder.glob("*.pid"):
            left.unlink()
        (hosts.folder / "job.py").write_text(
            "import os, signal, subprocess, sys, time\n"
            "from pathlib import Path\n"
            "rank = int(os.environ['RANK'])\n" + textwrap.dedent(source)
        )
        return "job.py"

    return write


#: Every rank starts a process in a session of its own, notes both, and waits for all ranks.
WITH_GRANDCHILDREN = """
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
Path(f"child{rank}.pid").write_text(str(child.pid))
Path(f"rank{rank}.pid").write_text(str(os.getpid()))
while len(list(Path().glob("rank*.pid"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)
"""


def noted_processes(hosts: Hosts) -> list[int]:
    texts = [path.read_text() for path in hosts.folder.glob("*.pid")]
    return [int(text) for text in texts if text]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.05)


def test_ranks_of_both_hosts_form_one_world(hosts: Hosts, script: Callable[[str], str]) -> None:
    path = script("""
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([float(rank)])
        dist.all_reduce(total)
        print(total.item(), os.environ["WORLD_SIZE"], sys.argv[1:], os.environ["ODD"])
        Path(f"at{rank}").write_text(os.environ["LOCAL_RANK"] + os.environ["GROUP_RANK"])
        dist.destroy_process_group()
    """)

    code, out, err = hosts.run("--env", 'ODD=it\'s "two"\nlines $HOME', path, "--lr", "1 e")

    assert (code, err) == (0, "")
    assert out == "3.0 3 ['--lr', '1 e'] it's \"two\"\nlines $HOME\n"
    assert [(hosts.folder / f"at{rank}").read_text() for rank in range(3)] == ["00", "01", "11"]


def test_first_failure_is_named_with_its_host_and_its_traceback_is_last_and_alone(
    hosts: Hosts, script: Callable[[str], str]
) -> None:
    path = script(
        WITH_GRANDCHILDREN
        + """
if rank == 2:
    # The marker follows the traceback, however long this process is kept waiting.
    sys.excepthook = lambda *e: (sys.__excepthook__(*e), Path("failing.pid").touch())
    raise ValueError("the cause")
while not Path("failing.pid").exists():
    time.sleep(0.01)
time.sleep(1)
raise RuntimeError("connection closed by peer")
"""
    )

    code, _, err = hosts.run(path)

    assert code == 1
    assert f"ds: rank 2 failed first on {HOST_2}: exit code 1, pid " in err
    assert re.search(rf"output of every rank there: {hosts.folder}/ds-run-\w+\n", err)
    assert err.endswith("ValueError: the cause\n")
    assert err.count("Traceback") == 1
    assert not any(is_running(pid) for pid in noted_processes(hosts))


def test_job_ends_when_the_agent_of_a_host_is_killed(
    hosts: Hosts, script: Callable[[str], str]
) -> None:
    path = script(
        WITH_GRANDCHILDREN + "Path(f'agent{rank}').write_text(str(os.getppid()))\ntime.sleep(600)"
    )
    job = hosts.start("--nproc", "1", path)
    wait_until(lambda: (hosts.folder / "agent1").exists() and len(noted_processes(hosts)) == 4)

    os.kill(int((hosts.folder / "agent1").read_text()), signal.SIGKILL)
    _, err = job.communicate(timeout=60)

    assert job.returncode == 255
    assert f"ds: {HOST_2} was lost: ssh ended with exit code 255: it could not connect" in err
    assert "Traceback" not in err
    wait_until(lambda: not any(is_running(pid) for pid in noted_processes(hosts)))


def test_job_ends_when_the_connection_to_a_host_drops(
    hosts: Hosts, script: Callable[[str], str]
) -> None:
    path = script(WITH_GRANDCHILDREN + "time.sleep(600)")
    job = hosts.start("--nproc", "1", path)
    wait_until(lambda: len(noted_processes(hosts)) == 4)

    for pid in sessions_of(hosts.namespaces[1], hosts.daemons[1].pid):
        os.kill(pid, signal.SIGKILL)
    _, err = job.communicate(timeout=60)

    assert job.returncode == 255
    assert f"ds: {HOST_2} was lost: ssh ended with exit code 255: it could not connect" in err
    wait_until(lambda: not any(is_running(pid) for pid in noted_processes(hosts)))


def test_ctrl_c_ends_the_job_on_all_hosts_in_one_line(
    hosts: Hosts, script: Callable[[str], str]
) -> None:
    path = script(WITH_GRANDCHILDREN + "time.sleep(600)")
    job = hosts.start("--nproc", "1", path)
    wait_until(lambda: len(noted_processes(hosts)) == 4)

    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=60)

    assert job.returncode == 130
    assert out == ""
    assert re.fullmatch(
        rf"ds: the job was ended by SIGINT; output of every rank: {HOST_1}:\S+, {HOST_2}:\S+\n", err
    )
    assert not any(is_running(pid) for pid in noted_processes(hosts))


def test_what_no_host_can_start_is_said_once(hosts: Hosts, script: Callable[[str], str]) -> None:
    code, _, err = hosts.run("no_such.py")

    assert code == 2
    assert err.startswith(f"ds: {HOST_1}, {HOST_2}: no_such.py: no such file in {hosts.folder}")
    assert err.count("\n") == 1


def test_command_runs_on_every_host(hosts: Hosts) -> None:
    words = ["ip", "netns", "exec", hosts.head, sys.executable, "-m", "ds_core.cli", "hosts", "run"]
    words += ["-H", str(hosts.folder / "hosts"), f"--ssh-args=-F {hosts.folder}/ssh_config", "--"]

    ran = subprocess.run(
        [*words, "ip -br addr show eth0 | grep -o 10.77.0.1.; test -e /no-such-file"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert sorted(ran.stdout.splitlines()) == [f"[{h}] {h}" for h in (HOST_1, HOST_2)]
    assert ran.returncode == 1
    assert f"failed on 2 of 2 hosts: {HOST_1} (exit code 1), {HOST_2} (exit code 1)" in ran.stderr


def sessions_of(namespace: str, daemon: int) -> list[int]:
    """The sshd processes of connections into a namespace, without the one that listens."""
    listed = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True
    )
    pids = [int(word) for word in listed.stdout.split()]
    return [pid for pid in pids if pid != daemon and process_name(pid).startswith("sshd")]


def process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="needs pdsh")
def test_pdsh_reaches_the_same_hosts(hosts: Hosts, script: Callable[[str], str]) -> None:
    path = script(
        WITH_GRANDCHILDREN
        + """
print(os.environ["GROUP_RANK"], os.environ["WORLD_SIZE"], sys.argv[1])
if rank == 1:
    raise ValueError("the cause" + "!" * 5000)
time.sleep(600)
"""
    )
    words = ["--launcher", "pdsh", "--launcher-args=", "--nproc", "1", path, "100%n"]

    code, out, err = hosts.run(*words)

    assert (code, out) == (1, "0 2 100%n\n")
    assert f"ds: rank 1 failed first on {HOST_2}: exit code 1" in err
    assert err.endswith("!!!!\n")
    wait_until(lambda: not any(is_running(pid) for pid in noted_processes(hosts)))


def test_elastic_job_goes_on_without_a_host_that_leaves(
    hosts: Hosts, script: Callable[[str], str]
) -> None:
    path = script("""
        world = int(os.environ["WORLD_SIZE"])
        print("started with", world)
        if world == 2:
            Path(f"agent{rank}.pid").write_text(str(os.getppid()))
            while not Path("left.pid").exists():
                time.sleep(0.01)
            sys.exit("a peer has left")
        while not Path("left.pid").exists():
            time.sleep(0.01)  # the other host is late: all start again when it comes
    """)
    quick = ("last_call_timeout=1", "keep_alive_interval=1", "keep_alive_max_attempt=5")
    conf = [word for setting in quick for word in ("--rdzv-conf", setting)]
    job = hosts.start("--nnodes", "1:2", *conf, "--max-restarts", "1", "--nproc", "1", path)
    wait_until(lambda: agent_of(hosts, HOST_2) > 0)

    os.kill(agent_of(hosts, HOST_2), signal.SIGKILL)
    (hosts.folder / "left.pid").touch()
    out, err = job.communicate(timeout=100)

    assert job.returncode == 0, err
    assert out.endswith("started with 1\n")
    assert f"ds run: {HOST_2} has left the job, which goes on with 1 of at least 1 hosts" in err


def agent_of(hosts: Hosts, address: str) -> int:
    """The process of `ds run` on a host once its rank runs; 0 before."""
    namespace = hosts.namespaces[(HOST_1, HOST_2).index(address)]
    listed = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True
    )
    noted = [int(path.read_text() or 0) for path in hosts.folder.glob("agent*.pid")]
    return next((pid for pid in noted if str(pid) in listed.stdout.split()), 0)
