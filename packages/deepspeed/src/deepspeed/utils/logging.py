"""The logger that programs of DeepSpeed use, and messages of chosen ranks."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

from ds_core import logs
from ds_core.comm import is_initialized
from ds_core.errors import DsError

log_levels = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
#: Whose messages `set_log_level_from_string` shows as well.
_PACKAGES = ("ds_core", "ds_ops", "ds_zero")


class _ToStandardOutput(logging.StreamHandler[Any]):
    """Follows whatever `sys.stdout` is at the time."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stdout


def _make_logger() -> logging.Logger:
    made = logging.getLogger("DeepSpeed")
    if not made.handlers:
        handler = _ToStandardOutput()
        form = "[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d:%(funcName)s] %(message)s"
        handler.setFormatter(logging.Formatter(form))
        made.addHandler(handler)
        made.setLevel(logging.WARNING)
        made.propagate = False
    return made


logger = _make_logger()


class LoggerFactory:
    """Makes loggers that write as `logger` does."""

    @staticmethod
    def create_logger(name: str | None = None, level: int = logging.WARNING) -> logging.Logger:
        """The logger of a name, at a level. Raises DsError without a name."""
        if name is None:
            raise DsError("LoggerFactory.create_logger: name: got None, expected a name")
        made = logging.getLogger(name)
        made.setLevel(level)
        made.propagate = False
        if not made.handlers:
            made.addHandler(logger.handlers[0])
        return made


@functools.cache
def warning_once(message: str, *args: Any) -> None:
    """Warn, but only once with the same message and arguments."""
    logger.warning(message, *args)


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if is_initialized() else -1


def get_dist_msg(message: object, ranks: Sequence[int] | None = None) -> str | None:
    """The message with this rank before it; None if this rank is not one of `ranks`.

    ranks: global ranks; [-1]: all; None or empty: none, once there is a process group.
    """
    rank = _rank()
    speaks = rank == -1 or (bool(ranks) and ranks is not None and (ranks[0] == -1 or rank in ranks))
    return f"[Rank {rank}] {message}" if speaks else None


def log_dist(
    message: object, ranks: Sequence[int] | None = None, level: int = logging.INFO
) -> None:
    """Log a message on the given ranks; see `get_dist_msg`."""
    told = get_dist_msg(message, ranks)
    if told is not None:
        logger.log(level, "%s", told, stacklevel=2)


def print_dist(message: object, ranks: Sequence[int] | None = None) -> None:
    """Write a message of the given ranks to standard output, whatever the log level."""
    told = get_dist_msg(message, ranks)
    if told is not None:
        sys.stdout.write(f"{told}\n")


@functools.cache
def _log_once(message: object, ranks: tuple[int, ...] | None, level: int) -> None:
    log_dist(message, ranks, level)


def log_dist_once(
    message: object, ranks: Sequence[int] | None = None, level: int = logging.INFO
) -> None:
    """`log_dist`, once for the same message, ranks and level."""
    _log_once(message, None if ranks is None else tuple(ranks), level)


def print_json_dist(
    message: MutableMapping[str, Any],
    ranks: Sequence[int] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> None:
    """Write a message with this rank in it to a JSON file, on the given ranks."""
    if get_dist_msg("", ranks) is not None and path is not None:
        message["rank"] = _rank()
        Path(path).write_text(json.dumps(message), encoding="utf-8")


def print_configuration(args: Namespace, name: str) -> None:
    """Log the values of parsed arguments."""
    lines = [
        f"  {key} {'.' * (29 - len(key))} {value}" for key, value in sorted(vars(args).items())
    ]
    logger.info("%s:\n%s", name, "\n".join(lines))


def get_log_level_from_string(log_level_str: str) -> int:
    """logging.INFO for "info", and so on. Raises DsError for a level that does not exist."""
    found = log_levels.get(log_level_str.lower())
    if found is None:
        raise LogLevelError(
            f"log level: got {log_level_str!r}, expected one of {', '.join(log_levels)}"
        )
    return found


class LogLevelError(DsError, ValueError):
    """There is no such log level."""


def set_log_level_from_string(
    log_level_str: str, custom_logger: logging.Logger | None = None
) -> None:
    """Let a logger and its handlers speak from a level on.

    custom_logger: None: the logger of this module, and those of ds_core, ds_ops and ds_zero, which
    say what engines do.
    """
    level = get_log_level_from_string(log_level_str)
    chosen = custom_logger or logger
    chosen.setLevel(level)
    for handler in chosen.handlers:
        handler.setLevel(level)
    if custom_logger is None:
        logs.show(log_level_str.lower(), _PACKAGES, rank=max(_rank(), 0))


def get_current_level() -> int:
    """The level from which the logger speaks."""
    return logger.getEffectiveLevel()


def should_log_le(max_log_level_str: str) -> bool:
    """Whether the logger speaks at this level."""
    return get_current_level() <= get_log_level_from_string(max_log_level_str)


# Programs of the original call these as methods of the logger.
vars(logger).update(warning_once=warning_once, log_dist_once=log_dist_once)
