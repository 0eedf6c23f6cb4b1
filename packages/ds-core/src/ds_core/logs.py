"""Messages of the suite's loggers: silent by default, shown with the rank where asked for."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable


class _ToStandardError(logging.StreamHandler):
    """One for all engines of a process; follows whatever `sys.stderr` is at the time."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:
        return sys.stderr


def show(level: str, packages: Iterable[str], *, rank: int) -> None:
    """Let the loggers of `packages` speak from `level` on.

    Where the program has set up logging itself, its handlers get the messages; else they go to
    standard error, each with the rank that it is from.

    Args:
        level: "debug", "info", "warning", "error" or "critical".
        packages: top-level names, such as "ds_core".
        rank: global rank of this process.
    """
    for package in packages:
        logger = logging.getLogger(package)
        logger.setLevel(level.upper())
        mine = next((h for h in logger.handlers if isinstance(h, _ToStandardError)), None)
        if mine is None and not logging.getLogger().handlers:
            mine = _ToStandardError()
            logger.addHandler(mine)
        if mine is not None:
            text = f"[rank {rank}] %(levelname)s %(name)s: %(message)s"
            mine.setFormatter(logging.Formatter(text))
