"""The exact commands by which each launcher starts a job, for those that cannot run here, too."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from ds_core import plugins
from ds_core.cli import main
from ds_core.errors import LaunchError, PluginError
from ds_core.launcher import LaunchSpec
from ds_core.launcher.cluster import (
    ClusterJob,
    ClusterSpec,
    HostCommand,
    Manifest,
    describe,
    load_launcher,
    make_cluster_job,
)
from ds_core.launcher.manager_variables import (
    expand_nodelist,
    resolve_endpoint,
    resolve_node_rank,
)

PYTHON = "/opt/python"
AGENT = f"{PYTHON} -m ds_core.cli run --nproc 2"
REPORTS = "--show job --as-node --no-env-file"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and an environment with one variable that travels."""
    import os

    from ds_core.launcher.environment import forwarded

    for name in [*forwarded(os.environ), "CUDA_VISIBLE_DEVICES", "SLURM_CPUS_ON_NODE"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.delenv("PDSH_SSH_ARGS_APPEND", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("host1 slots=2\nhost2 slots=2\n")
    return tmp_path


def job_of(launcher: str, *, with_hosts: bool = True, **options: object) -> ClusterJob:
    spec = {"script": "train.py", "args": ("--lr", "1 e"), "nproc": 2}
    cluster = {"hostfile": "hosts" if with_hosts else None, "python": PYTHON, "options": {}}
    for name, value in options.items():
        (spec if name in LaunchSpec.__dataclass_fields__ else cluster)[name] = value
    return make_cluster_job(
        LaunchSpec(**spec),  # type: ignore[arg-type]
        ClusterSpec(launcher=launcher, **cluster),  # type: ignore[arg-type]
        load_launcher(launcher),
    )


def commands_of(launcher: str, **options: object) -> list[str]:
    job = job_of(launcher, **options)
    commands = load_launcher(launcher).commands(job)
    assert not isinstance(commands, Manifest)
    return [command.describe() for command in commands]


def manifest_of(**options: object) -> dict[str, object]:
    options = {"with_hosts": False, "num_nodes": 3, **options}
    found = load_launcher("kubernetes").commands(job_of("kubernetes", **options))
    assert isinstance(found, Manifest)
    manifest: dict[str, object] = json.loads(found.text)
    return manifest


def test_launchers_are_entry_points() -> None:
    expected = {"ssh", "pdsh", "slurm", "openmpi", "mpich", "impi", "kubernetes", "ray"}
    assert expected <= set(plugins.registered("launchers"))
    with pytest.raises(PluginError, match="nothing installed provides 'rsh'"):
        load_launcher("rsh")


def test_ssh_starts_the_agent_of_each_host(folder: Path) -> None:
    first, second = commands_of("ssh", arguments=("-i", "my key"), options={"port": "2222"})

    words = shlex.split(second)
    assert words[:1] == ["ssh"]
    assert "BatchMode=yes" in words
    assert words[-6:-1] == ["-p", "2222", "-i", "my key", "host2"]
    meeting = "--nnodes 2 --rdzv-endpoint host1:29500 --node-rank"
    line = "cd {} && exec env NCCL_DEBUG=INFO {} {} {} {} --tied-to-stdin train.py --lr '1 e'"
    assert words[-1] == line.format(folder, AGENT, meeting, 1, REPORTS)
    assert shlex.split(first)[-1] == line.format(folder, AGENT, meeting, 0, REPORTS)


def test_ssh_sends_slots_named_by_the_user_as_devices_and_no_others() -> None:
    first, second = commands_of("ssh", include="host1:1@host2", nproc="auto")

    assert "run --nproc 1 --devices 1 " in first
    assert "run --nproc 2 --nnodes" in second


def test_one_host_meets_nobody() -> None:
    (only,) = commands_of("ssh", include="host2")

    assert "--rdzv-endpoint" not in only
    assert f"{AGENT} --show" in only


def test_elastic_job_numbers_its_nodes_itself() -> None:
    first, second = commands_of("ssh", nnodes="1:2", max_restarts=3)

    assert "--nnodes 1:2 --rdzv-endpoint host1:29500 --local-addr host1" in first
    assert "--rdzv-conf is_host=true" in first
    assert "--local-addr host2 --rdzv-conf is_host=false --max-restarts 3" in second
    assert "--node-rank" not in first + second


def test_options_of_the_job_reach_the_agents() -> None:
    first, _ = commands_of(
        "ssh",
        bind_cores="auto",
        log_dir="/shared/logs",
        show="all",
        rdzv_conf=(("timeout", "60"),),
        env=("A=it's",),
        is_module=True,
        options={"setup": ". venv/bin/activate"},
    )

    line = shlex.split(first)[-1]
    assert "&& . venv/bin/activate && exec env NCCL_DEBUG=INFO" in line
    assert "A=it's" in shlex.split(line)
    for words in ("--bind-cores auto", "--log-dir /shared/logs", "--show all", "--module"):
        assert words in line
    assert "--rdzv-conf timeout=60" in line


def test_pdsh_reaches_all_hosts_with_one_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F mine")

    (command,) = commands_of("pdsh", args=("100%",))

    variable, *words = shlex.split(command)
    assert variable.startswith("PDSH_SSH_ARGS_APPEND=-o BatchMode=yes")
    assert variable.endswith(" -F mine")
    assert words[:-1] == ["pdsh", "-S", "-b", "-N", "-R", "ssh", "-f", "2", "-w", "host1,host2"]
    assert words[-1] == (
        f"cd {folder} && exec env NCCL_DEBUG=INFO {AGENT} --nnodes 2 --rdzv-endpoint host1:29500 "
        f"--node-rank %n {REPORTS} --tied-to-stdin train.py 100%%"
    )


def test_srun_starts_one_task_per_node_that_may_use_all_cores(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "64")

    (command,) = commands_of(
        "slurm", with_hosts=False, num_nodes=4, options={"partition": "gpu"}, arguments=("-v",)
    )

    assert command == (
        "srun --nodes=4 --ntasks=4 --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 "
        f"--export=ALL --chdir={folder} --partition=gpu --cpus-per-task=64 -v "
        f"env NCCL_DEBUG=INFO {AGENT} --nnodes 4 --rdzv-endpoint auto --node-rank auto {REPORTS} "
        "train.py --lr '1 e'"
    )


@pytest.mark.parametrize(
    ("launcher", "start"),
    [
        pytest.param(
            "openmpi",
            "mpirun -n 2 --host host1:1,host2:1 --map-by ppr:1:node --bind-to none --wdir {}",
            id="openmpi",
        ),
        pytest.param(
            "mpich", "mpiexec -n 2 -ppn 1 -hosts host1,host2 -bind-to none -wdir {}", id="mpich"
        ),
        pytest.param(
            "impi",
            "mpirun -n 2 -ppn 1 -hosts host1,host2 -genv I_MPI_PIN 0 -wdir {}",
            id="intel-mpi",
        ),
    ],
)
def test_mpi_starts_one_unbound_agent_per_host(folder: Path, launcher: str, start: str) -> None:
    (command,) = commands_of(launcher)

    agent = f"env NCCL_DEBUG=INFO {AGENT} --nnodes 2 --rdzv-endpoint host1:29500 --node-rank auto"
    assert command == f"{start.format(folder)} {agent} {REPORTS} train.py --lr '1 e'"


def test_ray_runs_a_driver(folder: Path) -> None:
    (command,) = commands_of("ray", with_hosts=False, num_nodes=2, options={"gpus": "0"})

    driver, _, agent = command.partition(" -- ")
    assert driver == (
        f"{sys.executable} -m ds_core.launcher.launchers.ray_driver --address auto --num-nodes 2 "
        f"--folder {folder} --gpus 0 --cpus 1 --wait-s 600"
    )
    assert agent.startswith(f"env NCCL_DEBUG=INFO {AGENT} --nnodes 2 --rdzv-endpoint auto")


def test_kubernetes_manifest_has_a_master_and_workers() -> None:
    manifest = manifest_of(
        options={"image": "img", "name": "job", "namespace": "ml", "claim": "data:/data"},
        env=("A=1",),
        timeout_s=60,
        python=None,
    )

    assert manifest["apiVersion"] == "kubeflow.org/v1"
    assert manifest["metadata"] == {"name": "job", "namespace": "ml"}
    replicas = manifest["spec"]["pytorchReplicaSpecs"]  # type: ignore[index]
    assert {kind: each["replicas"] for kind, each in replicas.items()} == {"Master": 1, "Worker": 2}
    pod = replicas["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (container["name"], container["image"]) == ("pytorch", "img")
    assert shlex.join(container["command"]) == (
        "python -m ds_core.cli run --nproc 2 --nnodes 3 --rdzv-endpoint auto --node-rank auto "
        "--show node --timeout-s 60 --no-env-file train.py --lr '1 e'"
    )
    assert container["env"] == [{"name": "A", "value": "1"}]  # nothing of this machine
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "2"}}
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/dev/shm", "/data"]
    assert pod["volumes"][1]["persistentVolumeClaim"] == {"claimName": "data"}


@pytest.mark.parametrize(
    ("launcher", "options", "message"),
    [
        pytest.param("ssh", {"with_hosts": False}, "ssh: needs --hostfile", id="ssh-no-hosts"),
        pytest.param("mpich", {"with_hosts": False}, "mpich: needs --hostfile", id="mpi-no-hosts"),
        pytest.param(
            "ssh", {"options": {"colour": "1"}}, "no option 'colour'; it has", id="option"
        ),
        pytest.param(
            "pdsh",
            {"include": "host1:1@host2", "nproc": "auto"},
            "the hosts of this job have different",
            id="differ",
        ),
        pytest.param("pdsh", {"nnodes": "1:2"}, "use --launcher ssh for an elastic", id="elastic"),
        pytest.param("ssh", {"nnodes": "1:3"}, "got 1:3, but the job has 2 hosts", id="too-many"),
        pytest.param("ssh", {"node_rank": 1}, "numbers the hosts itself", id="node-rank"),
        pytest.param(
            "ssh", {"with_hosts": False, "include": "host1"}, "give --hostfile", id="no-hostfile"
        ),
        pytest.param(
            "ssh",
            {"include": "host1:0", "devices": (1,), "nproc": "auto"},
            "named by --include",
            id="devices",
        ),
        pytest.param("kubernetes", {}, "Kubernetes chooses the hosts", id="kubernetes-hosts"),
        pytest.param(
            "kubernetes", {"with_hosts": False, "num_nodes": 1}, "needs image=", id="no-image"
        ),
        pytest.param(
            "kubernetes",
            {"with_hosts": False, "num_nodes": 1, "options": {"image": "i", "name": "My_Job"}},
            "got name='My_Job'",
            id="kubernetes-name",
        ),
        pytest.param(
            "ray", {"with_hosts": False, "nproc": "auto"}, "--nproc: give the number", id="ray-auto"
        ),
    ],
)
def test_impossible_job_is_refused(launcher: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        load_launcher(launcher).commands(job_of(launcher, **options))


def test_localhost_is_no_name_for_one_of_several_hosts(folder: Path) -> None:
    (folder / "hosts").write_text("localhost slots=1\nhost2 slots=1\n")

    with pytest.raises(LaunchError, match="localhost means another machine on each host"):
        job_of("ssh", nproc="auto")


def test_dry_run_prints_every_command_and_the_origin_of_variables(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / ".ds_env").write_text("A=1\n")

    with pytest.raises(SystemExit, match="0"):
        main(["run", "-H", "hosts", "--env", "B=2", "--dry-run", "train.py"])

    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "# environment, forwarded from here: NCCL_DEBUG",
        f"# environment, {folder}/.ds_env: A",
        "# environment, --env: B",
    ]
    assert [line for line in lines if not line.startswith("ssh ")][3:] == ["# host1", "# host2"]
    assert "env NCCL_DEBUG=INFO A=1 B=2 " in lines[4]


def test_launchers_and_their_options_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--list-launchers"])

    text = capsys.readouterr().out
    assert "ssh: ssh to every host of --hostfile" in text
    assert "    -O image=...  container image" in text


def test_options_for_several_hosts_need_some() -> None:
    with pytest.raises(LaunchError, match="--include: is for several hosts; give --hostfile"):
        main(["--debug", "run", "--include", "host1", "train.py"])


def test_command_description_can_be_pasted() -> None:
    command = HostCommand(
        hosts=("h",), argv=("ssh", "h", "a 'b'"), environment={"X": "1 2"}, is_tied=True
    )

    assert shlex.split(command.describe()) == ["X=1 2", "ssh", "h", "a 'b'"]
    assert describe(job_of("ssh"), (command,)).splitlines()[-2] == "# h"


# --- What cluster managers say --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        pytest.param("node1", ["node1"], id="one"),
        pytest.param(
            "node[01-03,7],login", ["node01", "node02", "node03", "node7", "login"], id="ranges"
        ),
        pytest.param("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"], id="two-brackets"),
        pytest.param("a[8-10].lan", ["a8.lan", "a9.lan", "a10.lan"], id="suffix"),
    ],
)
def test_node_list_is_expanded(text: str, hosts: list[str]) -> None:
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["", "node[a-b]"])
def test_wrong_node_list_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="got node list"):
        expand_nodelist(text)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        pytest.param({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, 3, id="slurm"),
        pytest.param({"OMPI_COMM_WORLD_RANK": "1"}, 1, id="openmpi"),
        pytest.param({"PMI_RANK": "2", "PMI_SIZE": "4"}, 2, id="hydra"),
        pytest.param({"PET_NODE_RANK": "2", "PET_NNODES": "4"}, 2, id="kubernetes"),
        pytest.param({"DS_NODE_RANK": "0", "SLURM_PROCID": "3"}, 0, id="ours-first"),
        pytest.param(
            {"OMPI_COMM_WORLD_RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "3"},
            1,
            id="mpirun-in-a-slurm-allocation",
        ),
    ],
)
def test_node_rank_is_that_of_the_manager(environment: dict[str, str], rank: int) -> None:
    assert resolve_node_rank(environment, 4) == rank


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param({}, "no cluster manager numbers this node", id="none"),
        pytest.param({"SLURM_PROCID": "x"}, "SLURM_PROCID='x', set by Slurm", id="no-number"),
        pytest.param(
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "16"},
            "Slurm started 16 tasks .* but the job has 4 nodes; start one task per node",
            id="several-per-node",
        ),
    ],
)
def test_node_rank_that_nobody_says_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        resolve_node_rank(environment, 4)


@pytest.mark.parametrize(
    ("text", "environment", "endpoint"),
    [
        pytest.param("h:1", {"MASTER_ADDR": "m"}, "h:1", id="given"),
        pytest.param("auto", {"SLURM_JOB_NODELIST": "n[2-3]"}, "n2:29500", id="slurm"),
        pytest.param("auto:7", {"SLURM_JOB_NODELIST": "n[2-3]"}, "n2:7", id="slurm-port"),
        pytest.param("auto", {"MASTER_ADDR": "m", "MASTER_PORT": "23456"}, "m:23456", id="master"),
    ],
)
def test_endpoint_is_that_of_the_manager(
    text: str, environment: dict[str, str], endpoint: str
) -> None:
    assert resolve_endpoint(text, environment) == endpoint


def test_endpoint_that_nobody_says_is_refused() -> None:
    with pytest.raises(LaunchError, match="give HOST:PORT, the same on all nodes"):
        resolve_endpoint("auto", {})
