"""The sections of a config that say where figures go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ds_core.config import Section
from ds_core.observers.sections import CometSection, CsvSection, TensorBoardSection, WandbSection

TensorBoardConfig = TensorBoardSection
WandbConfig = WandbSection
CSVConfig = CsvSection
CometConfig = CometSection


class DeepSpeedMonitorConfig(Section):
    """Where figures go."""

    tensorboard: TensorBoardSection = Field(default_factory=TensorBoardSection)
    wandb: WandbSection = Field(default_factory=WandbSection)
    csv_monitor: CsvSection = Field(default_factory=CsvSection)
    comet: CometSection = Field(default_factory=CometSection)

    @property
    def enabled(self) -> bool:
        """Whether they go anywhere."""
        places = (self.tensorboard, self.wandb, self.csv_monitor, self.comet)
        return any(place.enabled for place in places)


def get_monitor_config(param_dict: Mapping[str, Any]) -> DeepSpeedMonitorConfig:
    """Those sections of a config."""
    keys = DeepSpeedMonitorConfig.model_fields
    given = {key: param_dict[key] for key in keys if param_dict.get(key)}
    return DeepSpeedMonitorConfig.model_validate(given)
