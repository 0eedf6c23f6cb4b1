"""`CurriculumScheduler`: a schedule of ds_core.data by the original's configuration and methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ds_core.data import schedule as ours
from ds_core.errors import ConfigError

_TYPES = ("fixed_linear", "fixed_root", "fixed_discrete", "custom")


class CurriculumScheduler:
    """The difficulty at each optimizer step, counted from 1.

    Args:
        config: min_difficulty, max_difficulty, schedule_type and schedule_config.

    Raises ConfigError for a key that is missing, or another type of schedule.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        for key in ("min_difficulty", "max_difficulty", "schedule_type"):
            _required(config, key)
        self.state: dict[str, Any] = {
            **{key: config[key] for key in ("min_difficulty", "max_difficulty", "schedule_type")},
            "current_difficulty": config["min_difficulty"],
        }
        if "schedule_config" in config:
            self.state["schedule_config"] = config["schedule_config"]
        self.custom_get_difficulty: Callable[[int], int] | None = None
        self._schedule()

    def _schedule(self) -> Callable[[int], int]:
        state = self.state
        kind, how = state["schedule_type"], state.get("schedule_config", {})
        if kind == "custom":
            if self.custom_get_difficulty is None:
                return lambda step: int(state["min_difficulty"])
            return self.custom_get_difficulty
        if kind == "fixed_discrete":
            return ours.FixedDiscrete(_required(how, "difficulty"), _required(how, "max_step"))
        if kind in ("fixed_linear", "fixed_root"):
            return ours.FixedRoot(
                state["min_difficulty"],
                state["max_difficulty"],
                _required(how, "total_curriculum_step"),
                _required(how, "difficulty_step"),
                1.0 if kind == "fixed_linear" else _required(how, "root_degree"),
            )
        raise ConfigError(
            f"curriculum: schedule_type: got {kind!r}, expected one of {', '.join(_TYPES)}"
        )

    def set_custom_get_difficulty(self, schedule_function: Callable[[int], int]) -> None:
        """Use a function of the step, where schedule_type is "custom"."""
        self.custom_get_difficulty = schedule_function

    def get_difficulty(self, global_steps: int) -> int:
        """The difficulty at a step."""
        return self._schedule()(global_steps)

    def update_difficulty(self, global_steps: int) -> int:
        """The present difficulty, which is never below that of an earlier step."""
        if self.state["current_difficulty"] < self.state["max_difficulty"]:
            self.state["current_difficulty"] = self.get_difficulty(global_steps)
        return int(self.state["current_difficulty"])

    def get_current_difficulty(self) -> int:
        """That of the last `update_difficulty`."""
        return int(self.state["current_difficulty"])

    def set_current_difficulty(self, difficulty: int) -> None:
        """Go on from another difficulty."""
        self.state["current_difficulty"] = difficulty

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what `get_state` gave."""
        self.state = state


def _required(section: Mapping[str, Any], key: str) -> Any:
    if key not in section:
        raise ConfigError(f"curriculum: {key} is missing; give it")
    return section[key]
