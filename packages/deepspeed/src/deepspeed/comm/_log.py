"""The original's log of collectives: set up by `configure`, shown by `log_summary`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from deepspeed.comm._groups import group_of
from ds_core.comm import Traffic, TrafficRow, TrafficSummary
from ds_core.communication import CommsLoggerSection

logger = logging.getLogger("DeepSpeed")


class _Log:
    """What `configure` has set, and what has been collected since."""

    def __init__(self) -> None:
        self.section = CommsLoggerSection()
        self.traffic: Traffic | None = None

    def set_up(self, section: CommsLoggerSection) -> None:
        """Collect as a section says; what was collected so far is kept if nothing changes."""
        if section == self.section:
            return
        self.section = section
        if self.traffic is not None:
            self.traffic.stop()
            self.traffic = None
        if section.enabled:
            self.traffic = Traffic(
                None,
                ops=section.operations(),
                by_caller=section.debug,
                verbose=section.verbose,
            )


_log = _Log()


def configure(
    deepspeed_config: Any = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: Sequence[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Collect times and sizes of all collectives of this process from now on, engines' included.

    Args:
        deepspeed_config: a config (a dict, or a DeepSpeedConfig) whose "comms_logger" holds:
        enabled: whether to collect.
        prof_all: every operation; False: only those of
        prof_ops: names of operations.
        verbose: also log each as it completes.
        debug: a row per caller.
    """
    values = _log.section.model_dump()
    if deepspeed_config is not None:
        values |= _section_of(deepspeed_config)
    given = {
        "enabled": enabled,
        "prof_all": prof_all,
        "prof_ops": None if prof_ops is None else tuple(prof_ops),
        "verbose": verbose,
        "debug": debug,
    }
    values |= {name: value for name, value in given.items() if value is not None}
    _log.set_up(CommsLoggerSection.model_validate(values))


def _section_of(config: Any) -> dict[str, Any]:
    whole = config if isinstance(config, Mapping) else config.param_dict
    return dict(whole.get("comms_logger") or {})


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> dict[str, Any] | None:
    """Log what collectives took, as a table on rank 0, and return the figures if asked.

    Args:
        show_straggler: compare the ranks: who came last, and what that cost. Collective.
        return_dict: return {"summary": {operation: {message bytes: {"count", "total_latency_ms",
            "avg_latency_ms", "tput_avg_gbps", "busbw_avg_gbps"}}}, "straggler_analysis": None or
            {operation: {message bytes: {"last_rank", "lost_ms"}}}, "metadata": {"world_size",
            "rank"}} of this rank; rates are in Gbit/s, as the original tells them.
    """
    ours = group_of(None)
    assert ours is not None
    if _log.traffic is None:
        logger.warning(
            "log_summary: nothing was collected; call deepspeed.comm.configure(enabled=True) "
            'before, or set "comms_logger": {"enabled": true} in the config'
        )
        summary = TrafficSummary({ours.rank: []})
    elif show_straggler:
        summary = _log.traffic.summary(ours)
    else:
        summary = TrafficSummary({ours.rank: _log.traffic.rows()})
    if ours.rank == 0 and _log.traffic is not None:
        logger.info("collectives of rank 0:\n%s", summary.table())
    if not return_dict:
        return None
    return {
        "summary": _figures(summary),
        "straggler_analysis": _stragglers(summary) if show_straggler else None,
        "metadata": {"world_size": ours.size, "rank": ours.rank},
    }


def _figures(summary: TrafficSummary) -> dict[str, dict[int, dict[str, float]]]:
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row, _ in summary.rows():
        found.setdefault(row.op, {})[row.message_bytes] = {
            "count": row.num_calls,
            "total_latency_ms": row.latency_s * 1e3,
            "avg_latency_ms": row.mean_latency_s * 1e3,
            "tput_avg_gbps": row.algorithm_bandwidth * 8 / 1e9,
            "busbw_avg_gbps": row.bus_bandwidth * 8 / 1e9,
        }
    return found


def _stragglers(summary: TrafficSummary) -> dict[str, dict[int, dict[str, float]]]:
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row, late in summary.rows():
        if late is not None:
            told = {"last_rank": late.last_rank, "lost_ms": late.lost_s * 1e3}
            found.setdefault(row.op, {})[row.message_bytes] = told
    return found


def reset_log() -> None:
    """Forget what was collected so far."""
    if _log.traffic is not None:
        _log.traffic.reset()


def has_comm_data() -> bool:
    """Whether anything has been collected."""
    return bool(_rows())


def get_comm_operation_count() -> int:
    """Collectives collected so far."""
    return sum(row.num_calls for row in _rows())


def get_logged_comm_ops() -> list[str]:
    """The operations collected so far, by ds_core.comm's names."""
    return list(dict.fromkeys(row.op for row in _rows()))


def _rows() -> list[TrafficRow]:
    return [] if _log.traffic is None else _log.traffic.rows()
