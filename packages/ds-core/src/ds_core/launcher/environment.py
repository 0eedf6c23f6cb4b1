"""The environment of a job's processes: what the user sets, and what travels to other hosts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ds_core.errors import LaunchError

#: Variables that go to other hosts without being named, by the beginning of their name.
FORWARDED_PREFIXES = (
    "CUDA_",
    "DS_",
    "FI_",
    "GLOO_",
    "HF_",
    "KMP_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "RCCL_",
    "TORCH_",
    "TRITON_",
    "UCX_",
)
#: The same, by their whole name.
FORWARDED_NAMES = ("LD_LIBRARY_PATH", "PYTHONFAULTHANDLER", "PYTHONHASHSEED", "PYTHONPATH")
#: Never forwarded unless named: they belong to one machine, or to the launcher itself.
KEPT_HERE = frozenset(
    {"CUDA_VISIBLE_DEVICES", "DS_ENV_FILE", "DS_NODE_RANK", "DS_RUN_ID", "HF_HOME"}
)
#: Words in a name that mark a secret; anybody on a host can read a command line.
SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL", "JWT")
#: Files that are read from the current folder, else from the home folder; the first one counts.
ENV_FILE_NAMES = (".ds_env", ".deepspeed_env")

FORWARDING = (
    "Forwarded to other hosts from this environment: "
    + ", ".join(f"{prefix}*" for prefix in FORWARDED_PREFIXES)
    + ", "
    + ", ".join(FORWARDED_NAMES)
    + "; but not "
    + ", ".join(sorted(KEPT_HERE))
    + ", nor a name with "
    + ", ".join(SECRET_WORDS)
    + " in it, because anybody on a host can read a command line. --env sends any variable."
)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Setting:
    """A variable's value, and where it comes from, in words."""

    value: str
    origin: str


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of `environment` that goes to other hosts without being named."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name.startswith(FORWARDED_PREFIXES) or name in FORWARDED_NAMES)
        and name not in KEPT_HERE
        and not is_secret(name)
        and _NAME.fullmatch(name)
    }


def is_secret(name: str) -> bool:
    """Whether a variable's name says that nobody else should see its value."""
    return any(word in name.upper() for word in SECRET_WORDS)


def parse_env_options(words: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that `--env NAME=VALUE` and `--env NAME` set.

    Raises LaunchError for a name that is none, or that has no value here either.
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not _NAME.fullmatch(name):
            raise LaunchError(f"--env: got {word!r}, expected NAME=VALUE or NAME")
        if "\0" in value:
            raise LaunchError(f"--env: the value of {name} has a NUL character, which none may")
        if not equals:
            if name not in environment:
                raise LaunchError(f"--env: {name} is not set here; give {name}=VALUE")
            value = environment[name]
        found[name] = value
    return found


def find_env_file(folder: Path, home: Path) -> Path | None:
    """The file that counts if none is named: of `folder`, else of `home`."""
    for place in (folder, home):
        for name in ENV_FILE_NAMES:
            if (place / name).is_file():
                return place / name
    return None


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a file of lines `NAME=VALUE`.

    A value ends with its line. One that begins with a quote is read as a shell would read it.
    Empty lines and lines that begin with # do not count; a leading `export` is dropped.

    Raises LaunchError if the file cannot be read, or names every line of it that is wrong.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise LaunchError(f"env file {path} cannot be read: {reason}") from error
    found: dict[str, str] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        content = line.strip().removeprefix("export ").strip()
        if not content or content.startswith("#"):
            continue
        name, equals, value = content.partition("=")
        if not equals or not _NAME.fullmatch(name.strip()):
            problems.append(f"line {number}: got {content!r}, expected NAME=VALUE")
            continue
        try:
            found[name.strip()] = _unquoted(value.strip())
        except ValueError as error:
            problems.append(f"line {number}: the value of {name.strip()}: {error}")
    if problems:
        raise LaunchError("\n".join([f"env file {path} has mistakes:", *problems]))
    return found


def user_settings(
    options: Iterable[str], env_file: Path | None, environment: Mapping[str, str]
) -> dict[str, Setting]:
    """What the user sets for the job: `--env` before the env file."""
    settings = {}
    if env_file is not None:
        for name, value in read_env_file(env_file).items():
            settings[name] = Setting(value, str(env_file))
    for name, value in parse_env_options(options, environment).items():
        settings[name] = Setting(value, "--env")
    return settings


def _unquoted(value: str) -> str:
    if not value.startswith(("'", '"')):
        return value
    words = shlex.split(value)  # ValueError: no closing quotation
    if len(words) != 1:
        raise ValueError(f"something follows its closing quote: {value}")
    return words[0]
