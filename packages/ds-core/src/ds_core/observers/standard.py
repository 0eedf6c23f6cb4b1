"""The observers that a config asks for by ds-core's own sections."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ds_core.observers.csv_files import CsvFiles
from ds_core.observers.dashboards import Comet, TensorBoard, Wandb
from ds_core.observers.json_lines import JsonLines
from ds_core.observers.memory import MemoryByPhase
from ds_core.observers.metrics import Metrics
from ds_core.observers.progress import Progress
from ds_core.observers.sink import Sink
from ds_core.observers.throughput import Throughput

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.observers.sections import CsvSection, TensorBoardSection
    from ds_core.seams import Observer


def standard_observers(config: Config, *, rank: int) -> list[Observer]:
    """`MemoryByPhase`, `Metrics` and `Progress`, as far as the config asks for them.

    rank: global rank of this process. Raises DsError if a sink cannot be written.
    """
    is_used = bool(_sink_names(config))
    shows_progress = config.progress
    if not is_used and config.origin("progress") == "default":
        # Somebody who asks for a breakdown, and names no place, wants to see it.
        shows_progress = config.wall_clock_breakdown or config.memory_breakdown
    if not (is_used or shows_progress):
        return []
    memory = MemoryByPhase() if config.memory_breakdown else None
    found: list[Observer] = [] if memory is None else [memory]
    over_ranks = config.metrics.loss_over_ranks
    if is_used:
        found.append(
            Metrics(
                _sinks(config) if rank == 0 else (),
                every_steps=config.metrics.every_steps,
                throughput=_throughput(config),
                memory=memory,
                loss_over_ranks=over_ranks,
            )
        )
    if shows_progress:
        found.append(
            Progress(
                rank=rank,
                every_steps=config.steps_per_print,
                throughput=_throughput(config),
                memory=memory,
                loss_over_ranks=over_ranks,
            )
        )
    return found


def _throughput(config: Config) -> Throughput:
    clock = config.timers.throughput
    return Throughput(
        breakdown=config.wall_clock_breakdown,
        enabled=clock.enabled,
        synchronized=clock.synchronized,
    )


def _folder(section: CsvSection | TensorBoardSection) -> Path:
    return Path(section.output_path) / section.job_name


def _sink_names(config: Config) -> list[str]:
    dashboards = ("tensorboard", "csv_monitor", "wandb", "comet")
    found = [name for name in dashboards if getattr(config, name).enabled]
    return found if config.metrics.jsonl is None else ["jsonl", *found]


def _sinks(config: Config) -> list[Sink]:
    """One for each section that is enabled; those made before one that fails are closed."""
    makers = {
        "jsonl": lambda: JsonLines(config.metrics.jsonl or ""),
        "tensorboard": lambda: TensorBoard(_folder(config.tensorboard)),
        "csv_monitor": lambda: CsvFiles(_folder(config.csv_monitor)),
        "wandb": lambda: Wandb(config.wandb),
        "comet": lambda: Comet(config.comet),
    }
    found: list[Sink] = []
    try:
        for name in _sink_names(config):
            found.append(makers[name]())
    except BaseException:
        for sink in found:
            sink.close()
        raise
    return found
