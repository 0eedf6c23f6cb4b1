"""Figures of a program to the places that its config names, on ds_core.observers."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed._names import names_of
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from ds_core.comm import is_initialized
from ds_core.observers import Record, Sink
from ds_core.observers.standard import make_sinks, sinks_of
from ds_core.seams import EventKind


class MonitorMaster:
    """Writes to every place that is enabled, on rank 0.

    Args:
        monitor_config: what `get_monitor_config` returns.
    """

    def __init__(self, monitor_config: DeepSpeedMonitorConfig) -> None:
        self.monitor_config = monitor_config
        self.enabled = monitor_config.enabled
        self._sinks: list[Sink] = []
        if self.enabled and _rank() == 0:
            makers = sinks_of(
                csv=monitor_config.csv_monitor,
                board=monitor_config.tensorboard,
                wandb=monitor_config.wandb,
                comet=monitor_config.comet,
            )
            self._sinks = make_sinks(makers)

    def write_events(self, event_list: Sequence[tuple[str, float, int]]) -> None:
        """Write (name, value, step) of each: names are drawn as they are, over their steps."""
        for name, value, step in event_list:
            record = Record(EventKind.LOG, step=step, samples=step, values={name: value})
            for sink in self._sinks:
                sink.write(record)

    def close(self) -> None:
        """Write what is left."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if is_initialized() else 0


__getattr__, __dir__ = names_of(
    __name__,
    {},
    missing=dict.fromkeys(
        ("Monitor", "TensorBoardMonitor", "WandbMonitor", "csvMonitor", "CometMonitor"),
        "use MonitorMaster, or the sinks of ds_core.observers",
    ),
)
