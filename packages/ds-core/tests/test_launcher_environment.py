from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_core.errors import LaunchError
from ds_core.launcher import LaunchSpec, make_plan
from ds_core.launcher.cluster import ClusterJob
from ds_core.launcher.devices import parse_devices
from ds_core.launcher.environment import (
    Setting,
    find_env_file,
    forwarded,
    parse_env_options,
    read_env_file,
    user_settings,
)
from ds_core.launcher.environment_report import find_problems, report_environment
from ds_core.launcher.launchers.shell import shell_line


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No env file of the user, and none of the variables that the tests set."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "DS_ENV_FILE"):
        monkeypatch.delenv(name, raising=False)


def spec(**options: object) -> LaunchSpec:
    return LaunchSpec(script="true", with_python=False, **{"nproc": 1, **options})  # type: ignore[arg-type]


def problems(environment: dict[str, str], **options: object) -> str:
    return "\n".join(find_problems(environment, make_plan(spec(**options))))


# --- What travels to other hosts ------------------------------------------------------------------


def test_only_what_concerns_a_job_travels_by_itself() -> None:
    here = {
        "NCCL_DEBUG": "INFO",
        "PYTHONPATH": "/src",
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "secret",
        "DS_API_KEY": "secret",
        "DS_jwt": "secret",
        "CUDA_VISIBLE_DEVICES": "0",
        "PATH": "/bin",
        "RANK": "3",
        "MYNCCL_X": "1",
        "BASH_FUNC_x%%": "() { :; }",
    }

    assert forwarded(here) == {"HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "INFO", "PYTHONPATH": "/src"}


def test_named_variables_are_set_or_taken_from_here() -> None:
    words = ["A=1", "B", "C=x=y", "D="]

    assert parse_env_options(words, {"B": "here"}) == {"A": "1", "B": "here", "C": "x=y", "D": ""}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        pytest.param("B", "--env: B is not set here; give B=VALUE", id="unset"),
        pytest.param("1A=2", "got '1A=2', expected NAME=VALUE or NAME", id="no-name"),
        pytest.param("A=\0", "NUL character", id="nul"),
    ],
)
def test_wrong_env_option_is_refused(word: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        parse_env_options([word], {})


def test_env_file_is_read_as_a_shell_would_where_it_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / ".ds_env"
    path.write_text(
        "# settings\n\nPLAIN=a b # c\nexport NCCL_DEBUG=INFO\nSINGLE='it is $HOME'\n"
        'DOUBLE="say \\"hi\\""\nEMPTY=\n'
    )

    assert read_env_file(path) == {
        "PLAIN": "a b # c",
        "NCCL_DEBUG": "INFO",
        "SINGLE": "it is $HOME",
        "DOUBLE": 'say "hi"',
        "EMPTY": "",
    }


def test_every_mistake_of_an_env_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / ".ds_env"
    path.write_text("A=1\nnonsense\nB='open\nC='x' y\n")

    with pytest.raises(LaunchError) as error:
        read_env_file(path)

    text = str(error.value)
    assert "line 2: got 'nonsense', expected NAME=VALUE" in text
    assert "line 3: the value of B: No closing quotation" in text
    assert "line 4: the value of C: something follows its closing quote" in text


def test_env_file_of_the_folder_comes_before_that_of_the_home_folder(tmp_path: Path) -> None:
    folder, home = tmp_path / "job", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    assert find_env_file(folder, home) is None
    (home / ".ds_env").write_text("A=home")
    assert find_env_file(folder, home) == home / ".ds_env"
    (folder / ".deepspeed_env").write_text("A=job")
    assert find_env_file(folder, home) == folder / ".deepspeed_env"


def test_option_comes_before_env_file(tmp_path: Path) -> None:
    path = tmp_path / "vars"
    path.write_text("A=file\nB=file\n")

    found = user_settings(["A=option"], path, {})

    assert found == {"A": Setting("option", "--env"), "B": Setting("file", str(path))}


#: Text as a variable may hold it: anything but NUL, in UTF-8.
VALUES = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=30)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(VALUES, min_size=1, max_size=4), arguments=st.lists(VALUES, max_size=3))
def test_any_value_reaches_the_other_host_unchanged(
    values: list[str], arguments: list[str]
) -> None:
    environment = {f"V{number}": Setting(value, "--env") for number, value in enumerate(values)}
    show = "env -0 | grep -z '^V'; printf '%s\\0' \"$@\""
    job = ClusterJob(
        spec=spec(),
        nodes=(),
        num_nodes=1,
        environment=environment,
        folder="/",
        python="python",
        options={},
        arguments=(),
    )
    line = shell_line(job, (*job.environment_words(), "sh", "-c", show, "sh", *arguments))

    ran = subprocess.run(
        ["sh", "-c", line], env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=True
    )

    sent = [f"V{number}={value}" for number, value in enumerate(values)]
    *received, end = ran.stdout.decode().split("\0")
    assert end == ""
    assert sorted(received[: len(sent)]) == sorted(sent)
    assert received[len(sent) :] == (arguments or [""])


# --- Devices --------------------------------------------------------------------------------------


def test_chosen_devices_become_the_visible_ones() -> None:
    made = make_plan(spec(nproc="auto", devices=(0, 2)))

    assert made.nproc == 2
    assert made.environ(0)["CUDA_VISIBLE_DEVICES"] == "0,2"


def test_users_visible_devices_are_kept_or_the_contradiction_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 2")
    assert "CUDA_VISIBLE_DEVICES" not in make_plan(spec()).settings
    assert make_plan(spec(devices=(0, 2))).settings["CUDA_VISIBLE_DEVICES"].value == "0,2"

    with pytest.raises(LaunchError) as error:
        make_plan(spec(devices=(1,)))

    text = str(error.value)
    assert "devices 1 are asked for" in text
    assert "CUDA_VISIBLE_DEVICES=0, 2 is set; drop one of the two" in text
    assert "decided by the first of these that applies:\n  1. --devices" in text


@pytest.mark.parametrize("text", ["", "a", "0,0", "1-0", "0,4-2", "0,,1"])
def test_wrong_devices_are_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="expected different device numbers"):
        parse_devices(text)


def test_devices_may_be_ranges() -> None:
    assert parse_devices("0,4-6") == (0, 4, 5, 6)


# --- ds env ---------------------------------------------------------------------------------------


def test_report_says_where_each_variable_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".ds_env").write_text("NCCL_DEBUG=WARN\n")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("SLURM_PROCID", "0")

    report = report_environment(spec(env=("A=1",), devices=(3,)))

    origins = {each.name: (each.value, each.origin) for each in report.variables}
    assert origins["RANK"] == ("0", "ds run")
    assert origins["A"] == ("1", "--env")
    assert origins["NCCL_DEBUG"] == (
        "WARN",
        f"{tmp_path / '.ds_env'} (instead of 'INFO' in this shell)",
    )
    assert origins["GLOO_SOCKET_IFNAME"] == ("lo", "this shell, also sent to other hosts")
    assert origins["CUDA_VISIBLE_DEVICES"] == ("3", "ds run (--devices)")
    assert origins["SLURM_PROCID"] == ("0", "Slurm")
    assert report.problems == ()
    assert json.loads(report.as_json())["env_file"] == str(tmp_path / ".ds_env")


def test_report_hides_secrets_wherever_they_come_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".ds_env").write_text("WANDB_API_KEY=hunter2\n")
    monkeypatch.setenv("SLURM_JWT", "hunter2")
    monkeypatch.setenv("HF_TOKEN", "hunter2, too")

    report = report_environment(spec(env=("HF_TOKEN=hunter2",)))

    values = {each.name: each.value for each in report.variables}
    assert {values[name] for name in ("WANDB_API_KEY", "SLURM_JWT", "HF_TOKEN")} == {"(hidden)"}
    assert "hunter2" not in report.as_json()


@pytest.mark.parametrize(
    ("environment", "options", "words"),
    [
        pytest.param({"RANK": "1"}, {}, "RANK set, but not WORLD_SIZE", id="partial-world"),
        pytest.param(
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            {},
            "this shell says RANK=1 of WORLD_SIZE=2",
            id="leftover-world",
        ),
        pytest.param({"RANK": "2", "WORLD_SIZE": "2"}, {}, "RANK=2 is outside", id="rank"),
        pytest.param({"RANK": "x"}, {}, "RANK='x' is not a number", id="no-number"),
        pytest.param({"MASTER_PORT": "99999"}, {}, "'99999' is not a port", id="port"),
        pytest.param(
            {"CUDA_VISIBLE_DEVICES": "0"}, {"nproc": 2}, "leaves 1 devices to 2", id="too-few"
        ),
        pytest.param({"CUDA_VISIBLE_DEVICES": ""}, {}, "hides every device", id="hidden"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "1,1"}, {}, "a device twice", id="twice"),
        pytest.param(
            {"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"}, {}, "differ", id="two-names"
        ),
        pytest.param(
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
            {},
            "Slurm started 4 tasks (SLURM_NTASKS), but the job has 1 node: each task",
            id="slurm-tasks",
        ),
        pytest.param({"OMP_NUM_THREADS": "999"}, {}, "more than the", id="threads"),
        pytest.param({"OMP_NUM_THREADS": "many"}, {}, "is not a number", id="threads-text"),
        pytest.param(
            {"GLOO_SOCKET_IFNAME": "no0"}, {}, "no network interface no0 here", id="interface"
        ),
    ],
)
def test_problem_is_named(
    environment: dict[str, str], options: dict[str, object], words: str
) -> None:
    assert words in problems(environment, **options)


def test_taken_port_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]

        found = problems({}, nnodes=2, node_rank=0, rdzv_endpoint=f"host1:{port}")

    assert f"port {port} of this machine is taken" in found


def test_command_shows_problems_and_can_fail_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "5")
    command = [sys.executable, "-m", "ds_core.cli", "env", "--nproc", "2", "--check"]

    ran = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ran.returncode == 1
    assert "WORLD_SIZE " in ran.stdout
    assert "  - RANK set, but not WORLD_SIZE" in ran.stdout
