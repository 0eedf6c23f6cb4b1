"""The command `deepspeed`: the original's flags as words of `ds run`, and real processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deepspeed._errors import NotProvidedError
from deepspeed.launcher import local_rank, runner
from ds_core.errors import LaunchError
from ds_core.launcher.hostfile import Host

HOSTS = (Host("a", 2), Host("b", 2))
SCRIPT = ("--module", "deepspeed.launcher.local_rank", "python", "train.py", "--lr", "1")


def words(*flags, hosts=None):
    return runner.words_of(runner.parse_args([*flags, "train.py", "--lr", "1"]), hosts)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), ()),
        (("--num_gpus", "2"), ("--nproc", "2")),
        (("--num_accelerators=3", "--master_port", "2"), ("--nproc", "3")),
        (("--num_nodes", "1"), ()),
        (("--include", "localhost:0,1"), ("--nproc", "2")),
        (("-e", "localhost:1"), ("--nproc", "1")),
        (("--num_gpus=1", "--bind_cores_to_rank"), ("--nproc", "1")),
    ],
)
def test_flags_for_this_machine(flags, expected):
    found = words(*flags)
    binding = ("--bind-cores", "auto") if "--bind_cores_to_rank" in flags else ()
    assert tuple(found) == (*expected, "--show", "all", *binding, *SCRIPT)


def test_the_script_can_be_a_module_or_a_program():
    assert words("--module")[-4:] == ["module", "train.py", "--lr", "1"]
    assert words("--no_python")[-4:] == ["program", "train.py", "--lr", "1"]
    assert words("--no_local_rank")[-3:] == ["train.py", "--lr", "1"]
    assert words("--no_local_rank", "--module")[-4:] == ["--module", "train.py", "--lr", "1"]
    assert local_rank.command(["program", "run", "x"], "3") == ["run", "--local_rank=3", "x"]
    python = [sys.executable, "-u"]
    assert local_rank.command(["python", "s.py"], "0") == [*python, "s.py", "--local_rank=0"]
    assert local_rank.command(["module", "m"], "0") == [*python, "-m", "m", "--local_rank=0"]


def test_what_accelerate_writes_for_many_hosts():
    flags = ("--hostfile", "H", "--no_local_rank", "--launcher", "pdsh", "--num_gpus", "1")
    found = words(*flags, "--master_addr", "10.0.0.1", "--master_port", "3000", hosts=HOSTS)
    assert found[:-5] == [
        *("--hostfile", "H", "--nproc", "1", "--launcher", "pdsh"),
        *("--rdzv-endpoint", "10.0.0.1:3000"),
    ]


def test_what_accelerate_writes_for_hosts_started_by_hand():
    flags = ("--hostfile", "H", "--node_rank", "1", "--no_ssh", "--num_gpus", "2")
    found = words(*flags, "--master_port", "3000", hosts=HOSTS)
    assert found[:8] == [
        *("--nproc", "2", "--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "a:3000"),
    ]


def test_options_of_the_launcher():
    flags = ("--ssh_port=22", "--venv_script", "act", "--launcher_args=-v", "-i", "a@b:0")
    found = words(*flags, "--enable_each_rank_log", "logs", hosts=HOSTS)
    assert found[2:-6] == [
        *("--include", "a@b:0", "--launcher", "ssh", "--rdzv-endpoint", "a:29500"),
        *("--launcher-args=-v", "-O", "port=22", "-O", "setup=. act"),
        *("--show", "all", "--log-dir", "logs"),
    ]


def test_a_single_host_needs_no_launcher_unless_forced():
    assert words(hosts=HOSTS[:1])[:2] == ["--nproc", "2"]
    assert words("--include", "b:1", hosts=HOSTS)[:2] == ["--nproc", "1"]
    assert "--launcher" in words("--force_multi", hosts=HOSTS[:1])


@pytest.mark.parametrize(
    ("flags", "hosts", "message"),
    [
        (("--num_nodes", "2"), None, "there is no hostfile"),
        (("--include", "a", "--exclude", "b"), HOSTS, "give one of them"),
        (("--num_gpus", "1", "--include", "a"), HOSTS, "cannot be given with"),
        (("--launcher", "mvapich"), HOSTS, "got 'mvapich', expected one of pdsh, ssh"),
        (("--no_ssh",), HOSTS, "--node_rank: got -1, expected this host's number, 0 to 1"),
        (("--include", "c"), HOSTS, "'c' is not in the hostfile"),
    ],
)
def test_flags_that_cannot_be_followed(flags, hosts, message):
    with pytest.raises(LaunchError, match=message):
        words(*flags, hosts=hosts)


def test_autotuning_says_what_to_use():
    with pytest.raises(NotProvidedError, match="ds tune"):
        words("--autotuning", "tune")


def run(folder, *arguments):
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_processes_get_their_rank_and_their_arguments(tmp_path):
    (tmp_path / "train.py").write_text(
        "import os, sys\nprint(os.environ['RANK'], os.environ['WORLD_SIZE'], sys.argv)\n"
    )
    done = run(tmp_path, "--num_gpus", "2", "--save_pid", "train.py", "--deepspeed", "-x", "1")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        told = f"{rank} 2 ['train.py', '--local_rank={rank}', '--deepspeed', '-x', '1']"
        assert f"[rank {rank}] {told}" in done.stdout


def test_a_failure_is_told_with_its_code(tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit(7)\n")
    assert run(tmp_path, "--num_gpus", "1", "train.py").returncode == 7
    missing = run(tmp_path, "--num_gpus", "1", "gone.py")
    assert missing.returncode == 2
    assert "deepspeed: gone.py: there is no such file" in missing.stderr


def test_the_environment_file_has_the_originals_name():
    assert os.environ.get("DS_ENV_FILE", ".deepspeed_env") == runner.DEEPSPEED_ENVIRONMENT_NAME


def test_a_hostfile_that_is_not_there_means_this_machine(tmp_path):
    assert runner.fetch_hostfile(str(tmp_path / "none")) is None
    (tmp_path / "hosts").write_text("a slots=2\nb slots=4\n")
    assert runner.fetch_hostfile(str(tmp_path / "hosts")) == {"a": 2, "b": 4}
