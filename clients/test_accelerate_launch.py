"""`accelerate launch --use_deepspeed`: every flag, on this machine and as if there were several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).with_name("jobs")


def test_flags_reach_the_engine(launch, tmp_path):
    job = launch(
        "accelerate_flags.py",
        tmp_path / "run",
        launcher="accelerate",
        options=(
            *("--use_deepspeed", "--zero_stage", "3", "--mixed_precision", "bf16"),
            *("--offload_optimizer_device", "cpu", "--offload_param_device", "cpu"),
            *("--gradient_clipping", "0.25", "--gradient_accumulation_steps", "2"),
            *("--zero3_init_flag", "false", "--zero3_save_16bit_model", "true"),
            *("--deepspeed_moe_layer_cls_names", "Linear"),
        ),
    )
    assert job["plugin"] == {
        "zero_stage": 3,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "cpu",
        "zero3_init_flag": False,
        "gradient_clipping": 0.25,
        "gradient_accumulation_steps": 2,
        "zero3_save_16bit_model": True,
    }
    assert (job["precision"], job["classes"]) == ("bf16", "Linear")
    assert (job["stage"], job["clip"], job["steps"], job["batch"]) == (3, 0.25, 2, 4)
    assert job["gathers"]
    assert job["offload"] == ["cpu", "cpu"]
    assert job["inner"] == "DeepSpeedCPUAdam"


def test_a_file_and_disks(launch, tmp_path):
    """`--deepspeed_config_file`, with states and parameters on disk."""
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path / "states")},
        "offload_param": {"device": "nvme", "nvme_path": str(tmp_path / "weights")},
    }
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero}
    for folder in ("states", "weights"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = str(tmp_path / "config.json")
    job = launch(
        "accelerate_flags.py",
        tmp_path / "run",
        launcher="accelerate",
        options=("--use_deepspeed", "--deepspeed_config_file", file),
    )
    assert job["plugin"]["offload_param_device"] == "nvme"
    assert job["offload"] == ["nvme", "nvme"]
    assert job["losses"][-1] != job["losses"][0]


def _hosts(tmp_path: Path, *names: str) -> str:
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
    return str(tmp_path / "hosts")


def _command(python: str, port: int, rank: int, *options: str, out: Path) -> list[str]:
    return [
        *(python, "-m", "accelerate.commands.launch", "--use_deepspeed", "--zero_stage", "2"),
        *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
        *("--mixed_precision", "no", "--dynamo_backend", "no", *options),
        *(str(JOBS / "accelerate_flags.py"), "--out", str(out)),
    ]


@pytest.mark.parametrize("launcher", ["nossh", "standard"])
def test_one_command_on_each_of_two_hosts(python, port, variables, tmp_path, launcher):
    """Both hosts are this machine, in folders of their own."""
    hosts = _hosts(tmp_path, "127.0.0.1", "localhost")
    options = ("--deepspeed_multinode_launcher", launcher, "--deepspeed_hostfile", hosts)
    running = []
    for rank in range(2):
        folder = tmp_path / f"host{rank}"
        folder.mkdir()
        running.append(
            subprocess.Popen(
                _command(python, port, rank, *options, out=tmp_path),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=variables | {"DS_ENV_FILE": str(folder / "variables")},
                cwd=folder,
            )
        )
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    for rank in range(2):
        told = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert (told["world"], told["local_rank"], told["stage"]) == (2, 0, 2)


#: Stands for a program that reaches other hosts, and tells what it was called with.
RECORDER = """#!{python}
import json, os, sys
with open({told!r}, "w") as file:
    json.dump([sys.argv[1:], {{k: v for k, v in os.environ.items() if "ACCELERATE" in k}}], file)
"""


@pytest.mark.parametrize(
    ("launcher", "program"), [("pdsh", "pdsh"), ("openmpi", "mpirun"), ("mpich", "mpiexec")]
)
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ((), {"hostA", "hostB"}),
        (("--deepspeed_inclusion_filter", "hostB:0@hostC:0"), {"hostB", "hostC"}),
        (("--deepspeed_exclusion_filter", "hostB"), {"hostA", "hostC"}),
    ],
    ids=["all", "inclusion", "exclusion"],
)
def test_the_command_line_for_other_hosts(
    python, is_ours, port, variables, tmp_path, launcher, program, chosen, expected
):
    if not is_ours:
        pytest.skip("the original package asks the hosts first")
    if chosen and launcher != "pdsh":
        pytest.skip("the filters are the same for every launcher")
    told = tmp_path / "told.json"
    names = ("hostA", "hostB") if not chosen else ("hostA", "hostB", "hostC")
    hosts = _hosts(tmp_path, *names)
    (tmp_path / "bin").mkdir()
    recorder = tmp_path / "bin" / program
    recorder.write_text(RECORDER.format(python=sys.executable, told=str(told)))
    recorder.chmod(0o755)
    path = os.pathsep.join([str(recorder.parent), variables["PATH"]])
    options = ("--deepspeed_multinode_launcher", launcher, "--deepspeed_hostfile", hosts, *chosen)
    done = subprocess.run(
        _command(python, port, 0, *options, out=tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        env=variables | {"PATH": path},
        cwd=tmp_path,
        check=False,
    )
    assert told.exists(), done.stdout + done.stderr
    words, given = json.loads(told.read_text())
    said = " ".join(words)
    assert {name for name in ("hostA", "hostB", "hostC") if name in said} == expected
    assert str(port) in said
    assert "accelerate_flags.py" in said
    assert given["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    # accelerate writes its variables to the file that the command `deepspeed` reads.
    assert "ACCELERATE_USE_DEEPSPEED=true" in (tmp_path / ".deepspeed_env").read_text()
