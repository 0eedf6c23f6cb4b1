"""How a job that was started ends badly."""

from __future__ import annotations

from ds_core.errors import DsError


class JobFailure(DsError, RuntimeError):  # noqa: N818 - the job failed, not this program
    """A job ended other than by success. Its text is the report for the user.

    `exit_code` is what the launcher should exit with: the first failed process's own, 128 + N
    after signal N, 124 after the time limit.
    """

    def __init__(self, report: str, exit_code: int) -> None:
        super().__init__(report)
        self.exit_code = exit_code
