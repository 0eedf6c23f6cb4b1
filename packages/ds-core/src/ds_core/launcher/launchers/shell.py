"""The agent's command as one line for the shell of another host."""

from __future__ import annotations

import shlex

from ds_core.errors import LaunchError
from ds_core.launcher.cluster import ClusterJob


def shell_line(job: ClusterJob, words: tuple[str, ...]) -> str:
    """Goes to the job's folder, prepares, and becomes the agent.

    Every word is quoted for a POSIX shell, so values may hold spaces, quotes and newlines.

    Raises LaunchError for a NUL character, which no command line can hold.
    """
    if any("\0" in word for word in words):
        raise LaunchError("a word of the command has a NUL character, which none may have")
    steps = [f"cd {shlex.quote(job.folder)}"]
    if job.option("setup"):
        steps.append(job.option("setup"))
    steps.append(f"exec {shlex.join(words)}")
    return " && ".join(steps)
