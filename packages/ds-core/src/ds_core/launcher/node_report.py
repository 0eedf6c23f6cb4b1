"""What an agent tells the `ds run` that started it on its host: one line of JSON on stderr."""

from __future__ import annotations

import dataclasses
import json
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_core import _env
from ds_core.errors import DsError
from ds_core.launcher.errors import JobFailure
from ds_core.launcher.failure import NodeFailure
from ds_core.launcher.manager_variables import find_node_rank

if TYPE_CHECKING:
    from ds_core.launcher.plan import LaunchSpec

MARKER = b"DS_NODE_REPORT "
#: Some launchers' programs cut longer lines; the end of a traceback is what matters.
MAX_WORDS = 6000


@dataclass(frozen=True)
class NodeReport:
    """How the part of a job on one node ended badly.

    Attributes:
        host: the node's own host name.
        node_rank: its number, None in an elastic job.
        failure: the process that failed first there, if one did.
        error: why the part could not be started, if it could not.
        log_dir: folder with the output of its ranks; empty if there is none.
        sent_ns: when this was sent, by the node's clock.
    """

    host: str
    node_rank: int | None
    failure: NodeFailure | None
    error: str
    log_dir: str
    sent_ns: int

    @property
    def age_s(self) -> float:
        """Seconds from the last words of what failed to the sending of this.

        Both are taken on the node, so that the clocks of different nodes need not agree.
        """
        return 0.0 if self.failure is None else (self.sent_ns - self.failure.spoke_ns) / 1e9


def report_line(error: DsError, node_rank: int | None) -> bytes:
    """The line for an error that ended this node's part."""
    failure = error.node_failure if isinstance(error, JobFailure) else None
    if failure is not None:
        failure = dataclasses.replace(failure, last_words=failure.last_words[-MAX_WORDS:])
    content = {
        "host": socket.gethostname(),
        "node_rank": node_rank,
        "failure": None if failure is None else dataclasses.asdict(failure),
        "error": "" if isinstance(error, JobFailure) else str(error)[-MAX_WORDS:],
        "log_dir": error.log_dir if isinstance(error, JobFailure) else "",
        "sent_ns": time.time_ns(),
    }
    return MARKER + json.dumps(content).encode() + b"\n"


def parse_report(line: bytes) -> NodeReport | None:
    """The report in a line, whatever a launcher's program put before it; None without one."""
    _, marker, text = line.partition(MARKER)
    if not marker:
        return None
    try:
        content = json.loads(text)
        failure = content.pop("failure")
        if failure is not None:
            failure = NodeFailure(**{**failure, "others": tuple(failure["others"])})
        return NodeReport(failure=failure, **content)
    except (ValueError, TypeError, KeyError):
        return None


def own_node_rank(spec: LaunchSpec) -> int | None:
    """The number of this node, if it is known before the nodes meet."""
    if isinstance(spec.node_rank, int):
        return spec.node_rank
    if spec.node_rank is None:
        return 0 if str(spec.nnodes) == "1" else None
    found = find_node_rank(_env.whole())
    return None if found is None else found.number
