"""The folder of one run: settings, tokenizer, metrics, loss curve and checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from errors import ExampleError

DEFAULT_PARENT = Path("runs")
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Settings:
    """What a run cannot change when it is resumed.

    Attributes:
        size: name of the model's size.
        seq_tokens: tokens per sample.
        vocab: most token ids that the BPE may have.
        untied: whether the output layer has weights of its own.
        data: paths of the text; None: the standard library's source.
        max_mb: most text in MB; None: all of it.
        text: digest of the text, once it is known.
    """

    size: str = "10m"
    seq_tokens: int = 128
    vocab: int = 4096
    untied: bool = False
    data: list[str] | None = None
    max_mb: float | None = None
    text: str = ""


def of_new_run(out: str | None, given: dict[str, Any]) -> tuple[Path, Settings]:
    """The folder for a new run (`out`, or the next free one) and its settings.

    Raises ExampleError if the folder holds a run already.
    """
    folder = _next_folder() if out is None else Path(out)
    if (folder / SETTINGS).exists():
        raise ExampleError(
            f"--out: {str(folder)!r} holds a run already; go on with it by --resume, choose "
            f"another folder, or delete it"
        )
    settings = Settings(**given)
    if settings.data is None and settings.max_mb is None:
        # Tokenized in a second or two, and a run of the default length sees most of it.
        settings = replace(settings, max_mb=2.0)
    return folder, settings


def of_old_run(out: str | None, given: dict[str, Any]) -> tuple[Path, Settings]:
    """The folder of a run that was started (`out`, or the newest) and the settings it had.

    Raises ExampleError if there is none, or its settings differ from those `given`.
    """
    folder = _newest_folder() if out is None else Path(out)
    path = folder / SETTINGS
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        settings = Settings(**{field.name: stored[field.name] for field in fields(Settings)})
    except FileNotFoundError as error:
        raise ExampleError(f"{str(folder)!r} holds no run: {SETTINGS} does not exist") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExampleError(f"{str(path)!r} cannot be read: {error!r}") from error
    for name, value in given.items():
        if value != getattr(settings, name):
            raise ExampleError(
                f"--{name.replace('_', '-')}: got {value!r}, but the run in {str(folder)!r} was "
                f"started with {getattr(settings, name)!r}; leave it out, or start a new run"
            )
    return folder, settings


def write(folder: Path, settings: Settings, text_folder: Path) -> None:
    """Make the folder whole by itself: it keeps the settings and the tokenizer."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(text_folder / "tokenizer.json", folder / "tokenizer.json")
        (folder / SETTINGS).write_text(json.dumps(asdict(settings), indent=2) + "\n", "utf-8")
    except OSError as error:
        raise ExampleError(f"--out: cannot write to {str(folder)!r}: {error.strerror}") from error


def _numbered() -> list[tuple[int, Path]]:
    found = DEFAULT_PARENT.glob("gpt-*")
    return sorted((int(p.name[4:]), p) for p in found if p.name[4:].isdecimal())


def _next_folder() -> Path:
    last = max((number for number, _ in _numbered()), default=0)
    return DEFAULT_PARENT / f"gpt-{last + 1:03d}"


def _newest_folder() -> Path:
    runs = [path for _, path in _numbered() if (path / SETTINGS).exists()]
    if not runs:
        raise ExampleError(
            f"no run in {str(DEFAULT_PARENT.absolute())!r}; name its folder by --out"
        )
    return runs[-1]
