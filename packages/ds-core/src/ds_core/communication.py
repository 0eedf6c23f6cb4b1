"""The config sections `comm` and `comms_logger`, and what they set in motion."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from pydantic import Field, field_validator

from ds_core.comm import Mesh, board
from ds_core.comm.traffic import Traffic, TrafficRow, TrafficSummary
from ds_core.config import Section
from ds_core.config.section import refusal
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.engine import Engine

logger = logging.getLogger(__name__)

#: Operations of `ds_core.comm` as the ledger names them.
OPERATIONS = (
    *("all_gather", "all_gather_uneven", "all_reduce", "all_to_all", "all_to_all_uneven"),
    *("barrier", "broadcast", "exchange", "gather", "recv", "reduce", "reduce_scatter"),
    *("reduce_scatter_uneven", "scatter", "send"),
)
# DeepSpeed's names of the same.
_OTHER_NAMES = {
    "all_gather_base": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_coalesced": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "all_reduce_coalesced": "all_reduce",
    "inference_all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
    "reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "isend": "send",
    "irecv": "recv",
}
#: How long rank 0 waits at the end for what the other ranks have to say.
GATHER_S = 10.0


class CommSection(Section):
    """`comm`: when collectives give up, and whether they are checked."""

    timeout_s: float | None = Field(
        None,
        gt=0,
        description="A collective that cannot complete is an error after this time; null: "
        "as the process group was started, 600 unless DEEPSPEED_TIMEOUT says otherwise",
        json_schema_extra={"unit": "seconds"},
    )
    check: bool = Field(
        False,
        description="Compare operation, shape, dtype and caller of every collective across ranks "
        "before data moves; a difference is an error that names both sides",
    )


class CommsLoggerSection(Section):
    """`comms_logger`: a table of collectives by operation and size, logged at the end."""

    enabled: bool = Field(False, description="Collect, and log the table when the engine closes")
    verbose: bool = Field(False, description="Also log each collective as it completes")
    prof_all: bool = Field(True, description="Every operation; false: only those of prof_ops")
    debug: bool = Field(False, description="A row per caller, and not only per operation and size")
    prof_ops: tuple[str, ...] = Field(
        (), description="Operations to collect when prof_all is false; DeepSpeed's names are known"
    )

    @field_validator("prof_ops")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if _OTHER_NAMES.get(name, name) not in OPERATIONS:
                raise refusal(f"got {name!r}, expected some of {', '.join(OPERATIONS)}")
        return names

    def operations(self) -> frozenset[str] | None:
        """Those to collect; None: all."""
        if self.prof_all:
            return None
        return frozenset(_OTHER_NAMES.get(name, name) for name in self.prof_ops)


def apply(section: Section | None, mesh: Mesh) -> None:
    """Set up a mesh as section `comm` says. Collective."""
    if not isinstance(section, CommSection):
        return
    if section.timeout_s is not None:
        mesh.set_timeout(section.timeout_s)
    if section.check:
        mesh.check_collectives()


class CommsLogger:
    """Logs the table of collectives on rank 0 when the engine closes.

    The other ranks leave their figures in the rendezvous store, so that closing waits for nobody
    longer than `GATHER_S`; a rank that left none is not in the comparison.
    """

    def __init__(self, section: CommsLoggerSection) -> None:
        self._section = section
        self._traffic: Traffic | None = None

    def on_event(self, engine: Engine, event: Event) -> None:
        """Watch from the start, tell at the end."""
        if event.kind is EventKind.START:
            self._traffic = Traffic(
                engine.mesh.ledger,
                ops=self._section.operations(),
                by_caller=self._section.debug,
                verbose=self._section.verbose,
            )
        elif event.kind is EventKind.CLOSE and self._traffic is not None:
            self._traffic.stop()
            summary = _summary_on_first(self._traffic.rows())
            if summary is not None:
                logger.info("collectives of rank 0:\n%s", summary.table())


def comms_logger(config: Config) -> CommsLogger | None:
    """The observer that section `comms_logger` asks for."""
    section = config.section("comms_logger")
    if not isinstance(section, CommsLoggerSection) or not section.enabled:
        return None
    return CommsLogger(section)


def _summary_on_first(rows: list[TrafficRow]) -> TrafficSummary | None:
    """On rank 0 the rows of all ranks that have left theirs; None elsewhere."""
    rank, size = dist.get_rank(), dist.get_world_size()
    key = "ds_core/traffic/"
    if rank != 0:
        text = json.dumps([vars(row) for row in rows])
        try:
            board.ask(lambda store: store.set(f"{key}{rank}", text))
        except Exception as error:
            logger.warning("comms_logger: rank %d could not leave its figures: %s", rank, error)
        return None
    found = {0: rows}
    missing, deadline = set(range(1, size)), time.monotonic() + GATHER_S

    def read(store: Any) -> dict[int, list[TrafficRow]]:
        there = [other for other in missing if store.check([f"{key}{other}"])]
        return {r: [TrafficRow(**row) for row in json.loads(store.get(f"{key}{r}"))] for r in there}

    while missing and time.monotonic() < deadline:
        try:
            found.update(board.ask(read))
        except Exception as error:
            logger.warning("comms_logger: the rendezvous store fails: %s", error)
            break
        missing -= set(found)
        time.sleep(0.02 if missing else 0)
    return TrafficSummary(found)
