from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer

from ds_core import __version__
from ds_core.cli import main
from ds_core.cli.app import OWN_COMMANDS
from ds_core.errors import DsError, PluginError

Ds = Callable[..., "Result"]


class Result:
    """How a command ended and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


@pytest.fixture
def ds(capsys: pytest.CaptureFixture[str]) -> Ds:
    """Runs one command line in this process."""

    def run(*words: str) -> Result:
        with pytest.raises(SystemExit) as exit_:
            main(words)
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """Writes a config file and returns its path."""

    def write(content: dict[str, Any]) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


def install(monkeypatch: pytest.MonkeyPatch, **targets: str) -> None:
    """Pretend that a package registers these commands."""
    entries = {name: EntryPoint(name, value, "ds_core.commands") for name, value in targets.items()}

    def registered(seam: str) -> dict[str, EntryPoint]:
        return entries if seam == "commands" else {}

    monkeypatch.setattr("ds_core.plugins.registered", registered)


# --- The program ----------------------------------------------------------------------------------


def test_help_lists_the_commands(ds: Ds) -> None:
    result = ds("--help")

    assert result.code == 0
    listed = [line.split()[0] for line in result.out.split("Commands:")[1].split("\n") if line]
    assert {"run", "report", "config", "checkpoint", *OWN_COMMANDS} <= set(listed)


def test_version_is_shown(ds: Ds) -> None:
    assert ds("--version").out == f"ds-core {__version__}\n"


def test_help_imports_nothing_heavy_of_its_own() -> None:
    source = """
import sys
import ds_core
before = set(sys.modules)
from ds_core.cli.app import make_app
make_app()
heavy = {"rich", "pydantic", "numpy", "torch.distributed.elastic.agent.server.api"}
print(sorted(heavy & (set(sys.modules) - before)))
"""
    command = [sys.executable, "-c", source]

    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert printed == "[]\n"


def test_console_script_and_module_are_the_same_program() -> None:
    module = [sys.executable, "-m", "ds_core.cli", "--version"]

    assert subprocess.run(module, capture_output=True, text=True, check=True).stdout == (
        f"ds-core {__version__}\n"
    )


def test_error_of_the_suite_is_one_message_and_exit_code_2(ds: Ds) -> None:
    result = ds("run", "--nproc", "1", "no_such_file.py")

    assert result.code == 2
    assert result.err.startswith("ds: no_such_file.py: no such file in ")
    assert "Traceback" not in result.err


def test_debug_raises_the_error_itself() -> None:
    with pytest.raises(DsError, match="no such file"):
        main(["--debug", "run", "--nproc", "1", "no_such_file.py"])


# --- ds run ---------------------------------------------------------------------------------------


def test_run_hands_on_everything_after_the_script(ds: Ds, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.touch()

    result = ds("run", "--nproc", "2", "--dry-run", str(script), "--help", "--", "--nproc", "7")

    lines = result.out.splitlines()
    assert len(lines) == 3
    assert lines[1].endswith(f"-u {script} --help -- --nproc 7")


def test_run_exits_with_the_code_of_the_failed_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    script = tmp_path / "job.py"
    script.write_text("import sys; sys.exit(9)")

    command = [sys.executable, "-m", "ds_core.cli", "run", "--nproc", "1", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 9
    assert done.stderr.startswith("ds: rank 0 failed first: exit code 9")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["--nproc", "two"], "--nproc: got 'two', expected a number or auto", id="word"
        ),
        pytest.param(["--nproc", "0"], "--nproc: got 0", id="zero"),
        pytest.param(["--nporc", "2"], "--nporc", id="misspelt-option"),
    ],
)
def test_run_refuses_bad_options(ds: Ds, tmp_path: Path, words: list[str], message: str) -> None:
    script = tmp_path / "job.py"
    script.touch()

    result = ds("run", *words, str(script))

    assert result.code == 2
    assert message in result.err


# --- ds config ------------------------------------------------------------------------------------


def test_config_check_shows_values_with_their_origin(
    ds: Ds, config_file: Callable[[dict[str, Any]], str]
) -> None:
    path = config_file({"train_batch_size": 8, "gradient_accumulation_steps": 2})

    rows = ds("config", "check", path, "--world-size", "2").out.splitlines()

    cells = [row.split() for row in rows]
    assert cells[0] == ["key", "value", "origin"]
    assert ["train_batch_size", "8", "file"] in cells
    assert ["train_micro_batch_size_per_gpu", "2", "derived"] in cells


def test_config_check_can_explain_every_key(
    ds: Ds, config_file: Callable[[dict[str, Any]], str]
) -> None:
    path = config_file({"train_batch_size": 8})

    table = ds("config", "check", path, "--meanings").out
    rows = json.loads(ds("config", "check", path, "--json").out)

    assert "Samples per optimizer step" in table
    assert {"key", "value", "origin", "meaning"} == set(rows[0])


def test_config_check_prints_all_problems(
    ds: Ds, config_file: Callable[[dict[str, Any]], str]
) -> None:
    path = config_file({"train_batch_sise": 8, "gradient_clipping": "much"})

    result = ds("config", "check", path)

    assert result.code == 2
    assert "did you mean train_batch_size?" in result.err
    assert "gradient_clipping" in result.err


def test_config_schema_is_json_schema(ds: Ds) -> None:
    schema = json.loads(ds("config", "schema").out)

    assert schema["type"] == "object"
    assert "train_batch_size" in schema["properties"]


# --- Commands of packages -------------------------------------------------------------------------

words_app = typer.Typer()


@words_app.command()
def say(word: str, loud: bool = False) -> None:
    typer.echo(word.upper() if loud else word)


def return_code(arguments: list[str]) -> int:
    typer.echo(repr(arguments))
    return len(arguments)


not_a_command = 7


def test_typer_app_of_a_package_is_a_command(ds: Ds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_pillar", sys.modules[__name__])
    install(monkeypatch, words="a_pillar:words_app")

    assert "words" in ds("--help").out
    assert ds("words", "hello", "--loud").out == "HELLO\n"
    assert "Usage: ds words" in ds("words", "--help").out


def test_callable_of_a_package_gets_its_arguments_and_gives_the_exit_code(
    ds: Ds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "a_pillar", sys.modules[__name__])
    install(monkeypatch, count="a_pillar:return_code")

    result = ds("count", "--help", "-x", "--", "y")

    assert result.out == "['--help', '-x', '--', 'y']\n"
    assert result.code == 4


def test_package_is_not_imported_before_its_command_runs(
    ds: Ds, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, broken="no_such_module:app")

    assert "broken" in ds("--help").out
    result = ds("broken")
    assert result.code == 2
    assert "'broken'" in result.err
    assert "does not load" in result.err


def test_command_that_is_neither_app_nor_callable_is_refused(
    ds: Ds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "a_pillar", sys.modules[__name__])
    install(monkeypatch, seven="a_pillar:not_a_command")

    assert "expected a typer app or a callable" in ds("seven").err


def test_package_may_not_replace_a_command_of_ds_core(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, run="a_pillar:words_app")

    with pytest.raises(PluginError, match="registers 'run', which is a command of ds-core"):
        main(["--debug", "--help"])
