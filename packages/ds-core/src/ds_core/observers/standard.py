"""The observers that a config asks for by ds-core's own sections."""

from __future__ import annotations

from collections.abc import Callable
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
    from ds_core.observers.sections import (
        CometSection,
        CsvSection,
        TensorBoardSection,
        WandbSection,
    )
    from ds_core.seams import Observer


def standard_observers(config: Config, *, rank: int) -> list[Observer]:
    """`MemoryByPhase`, `Metrics` and `Progress`, as far as the config asks for them.

    rank: global rank of this process. Raises DsError if a sink cannot be written.
    """
    makers = _sink_makers(config)
    shows_progress = config.progress
    if config.origin("progress") == "default":
        # Somebody who says how often lines come, or asks for a breakdown and names no place for it,
        # wants to see them.
        breaks_down = config.wall_clock_breakdown or config.memory_breakdown
        shows_progress = config.steps_per_print is not None or (breaks_down and not makers)
    if not (makers or shows_progress):
        return []
    memory = MemoryByPhase() if config.memory_breakdown else None
    found: list[Observer] = [] if memory is None else [memory]
    over_ranks = config.metrics.loss_over_ranks
    if makers:
        found.append(
            Metrics(
                make_sinks(makers) if rank == 0 else (),
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
    from ds_core.observers.sections import TimersSection, section_of

    clock = section_of(config, "timers", TimersSection).throughput
    return Throughput(
        breakdown=config.wall_clock_breakdown,
        enabled=clock.enabled,
        synchronized=clock.synchronized,
    )


def _folder(section: CsvSection | TensorBoardSection) -> Path:
    return Path(section.output_path) / section.job_name


def _sink_makers(config: Config) -> list[Callable[[], Sink]]:
    """One for each sink that is asked for."""
    from ds_core.observers import sections

    jsonl = config.metrics.jsonl
    lines: list[Callable[[], Sink]] = [] if jsonl is None else [lambda: JsonLines(jsonl)]
    return lines + sinks_of(
        csv=sections.section_of(config, "csv_monitor", sections.CsvSection),
        board=sections.section_of(config, "tensorboard", sections.TensorBoardSection),
        wandb=sections.section_of(config, "wandb", sections.WandbSection),
        comet=sections.section_of(config, "comet", sections.CometSection),
    )


def sinks_of(
    *, csv: CsvSection, board: TensorBoardSection, wandb: WandbSection, comet: CometSection
) -> list[Callable[[], Sink]]:
    """What makes each sink that these sections enable."""
    makers: list[tuple[bool, Callable[[], Sink]]] = [
        (csv.enabled, lambda: CsvFiles(_folder(csv))),
        (board.enabled, lambda: TensorBoard(_folder(board))),
        (wandb.enabled, lambda: Wandb(wandb)),
        (comet.enabled, lambda: Comet(comet)),
    ]
    return [make for is_asked_for, make in makers if is_asked_for]


def make_sinks(makers: list[Callable[[], Sink]]) -> list[Sink]:
    """Make the sinks; those made before one that fails are closed."""
    found: list[Sink] = []
    try:
        for make in makers:
            found.append(make())
    except BaseException:
        for sink in found:
            sink.close()
        raise
    return found
