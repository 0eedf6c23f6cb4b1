"""The `ds` command line: commands of its own, and what installed packages add."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ds_core.errors import DsError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 after success, 2 after an error of the suite.

    A failed job exits with the code of the process that failed first. An error of the suite or of
    the file system is printed as its message alone; `ds --debug COMMAND` shows where it came from.

    Args:
        arguments: the command line without the program's name; default: this process's.
    """
    from ds_core.cli.app import OWN_COMMANDS, make_app
    from ds_core.launcher.errors import JobFailure

    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _leading_options(words)
    command = words[len(options) : len(options) + 1]
    if command and command[0] not in OWN_COMMANDS:
        # A package's command parses its words itself: "--" keeps ours from looking at them.
        words.insert(len(options) + 1, "--")
    try:
        make_app()(args=words, prog_name="ds")
    except (DsError, OSError) as error:
        if "--debug" in options:
            raise
        sys.stderr.write(f"ds: {error}\n")
        sys.exit(error.exit_code if isinstance(error, JobFailure) else 2)


def _leading_options(words: Sequence[str]) -> list[str]:
    """The options before the command; those after it are the command's own."""
    options = []
    for word in words:
        if not word.startswith("-"):
            break
        options.append(word)
    return options
