"""Sinks on the writers of TensorBoard, Weights & Biases and Comet, imported when made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_core.errors import DsError
from ds_core.observers.sink import Record, as_plain, vendor
from ds_core.seams import EventKind

if TYPE_CHECKING:
    from ds_core.observers.sections import CometSection, WandbSection


class TensorBoard:
    """A sink that writes event files which `tensorboard --logdir FOLDER` shows.

    Args:
        folder: created.

    Raises DsError if the package `tensorboard` is missing, or if the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        vendor("tensorboard", "tensorboard", "tensorboard")
        protocol = vendor("tensorboard", "tensorboard.compat.proto.summary_pb2", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._summary: Any = protocol.Summary
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._writer: Any = SummaryWriter(log_dir=os.fspath(folder))
        except OSError as error:
            raise DsError(
                f"tensorboard: cannot write into {os.fspath(folder)!r}: {error}; name a folder "
                f"that can be written in tensorboard.output_path"
            ) from error

    def write(self, record: Record) -> None:
        if record.kind is EventKind.START:
            text = "\n".join(f"* **{key}**: {value}" for key, value in record.values.items())
            self._writer.add_text("decisions", text, record.samples)
            return
        values = [
            self._summary.Value(tag=name, simple_value=value) for name, value in record.scalars()
        ]
        if values:
            # One summary with all scalars: `add_scalar` for each takes several times as long.
            self._writer.file_writer.add_summary(self._summary(value=values), record.samples)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A sink that starts one Weights & Biases run and logs to it.

    Where it writes, and whether it goes online, is wandb's own configuration.
    Raises DsError if the package is missing or no run can be started.
    """

    def __init__(self, section: WandbSection) -> None:
        wandb = vendor("wandb", "wandb", "wandb")
        try:
            self._run = wandb.init(
                project=section.project, group=section.group, entity=section.team
            )
        except Exception as error:
            raise DsError(f"wandb: no run could be started: {error}") from error

    def write(self, record: Record) -> None:
        if record.kind is EventKind.START:
            self._run.config.update(dict(record.values), allow_val_change=True)
            return
        scalars = dict(record.scalars())
        if scalars:
            self._run.log(scalars, step=record.samples)

    def close(self) -> None:
        self._run.finish()


class Comet:
    """A sink that starts, or goes on with, one Comet experiment.

    A scalar is sent when `samples_log_interval` samples have passed since its last value.
    Raises DsError if the package is missing or no experiment can be started.
    """

    def __init__(self, section: CometSection) -> None:
        comet = vendor("comet", "comet_ml", "comet")
        self._interval = section.samples_log_interval
        self._last: dict[str, int] = {}
        try:
            self._experiment = comet.start(
                api_key=section.api_key,
                workspace=section.workspace,
                project=section.project,
                experiment_key=section.experiment_key,
                mode=section.mode,
                online=section.online,
            )
        except Exception as error:
            raise DsError(f"comet: no experiment could be started: {error}") from error
        if section.experiment_name is not None:
            self._experiment.set_name(section.experiment_name)

    def write(self, record: Record) -> None:
        if record.kind is EventKind.START:
            self._experiment.log_parameters({k: as_plain(v) for k, v in record.values.items()})
            return
        for name, value in record.scalars():
            last = self._last.get(name)
            if last is None or record.samples - last >= self._interval:
                self._last[name] = record.samples
                self._experiment.log_metric(name, value, step=record.samples)

    def close(self) -> None:
        self._experiment.end()
