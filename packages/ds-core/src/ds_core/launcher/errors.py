"""How a job that was started ends badly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core.errors import DsError

if TYPE_CHECKING:
    from ds_core.launcher.failure import NodeFailure


class JobFailure(DsError, RuntimeError):  # noqa: N818 - the job failed, not this program
    """A job ended other than by success. Its text is the report for the user.

    `exit_code` is what the launcher should exit with: the first failed process's own, 128 + N
    after signal N, 124 after the time limit. `node_failure` is what the report says, as data, if
    a process of this node failed; `log_dir` the folder with the output of this node's ranks.
    """

    def __init__(
        self,
        report: str,
        exit_code: int,
        *,
        node_failure: NodeFailure | None = None,
        log_dir: str = "",
    ) -> None:
        super().__init__(report)
        self.exit_code = exit_code
        self.node_failure = node_failure
        self.log_dir = log_dir
