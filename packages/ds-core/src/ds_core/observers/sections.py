"""Config sections of the dashboards, under DeepSpeed's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field

from ds_core.config import Section

if TYPE_CHECKING:
    from ds_core.config import Config

SectionT = TypeVar("SectionT", bound=Section)


def section_of(config: Config, name: str, kind: type[SectionT]) -> SectionT:
    """The section of that name, its defaults where the config has none."""
    found = config.section(name)
    return found if isinstance(found, kind) else kind()


class TensorBoardSection(Section):
    """Scalars as TensorBoard event files, written by rank 0."""

    enabled: bool = Field(
        default=False,
        description="Whether it is written; needs pip install 'ds-core[tensorboard]'.",
    )
    output_path: str = Field(
        default="", description='Folder of all jobs; "": the working directory.'
    )
    job_name: str = Field(
        default="DeepSpeedJobName", description="Folder of this job inside output_path."
    )


class CsvSection(Section):
    """One CSV file per scalar, with columns for the samples so far and the value."""

    enabled: bool = Field(default=False, description="Whether they are written, by rank 0.")
    output_path: str = Field(
        default="", description='Folder of all jobs; "": the working directory.'
    )
    job_name: str = Field(
        default="DeepSpeedJobName", description="Folder of this job inside output_path."
    )


class WandbSection(Section):
    """Scalars to Weights & Biases, from rank 0."""

    enabled: bool = Field(
        default=False, description="Whether it is used; needs pip install 'ds-core[wandb]'."
    )
    group: str | None = Field(default=None, description="Group of runs; null: none.")
    team: str | None = Field(
        default=None, description="Team or user that owns the run; null: the account's default."
    )
    project: str = Field(default="deepspeed", description="Project of the run.")


class CometSection(Section):
    """Scalars to Comet, from rank 0. What is null here, Comet takes from its own configuration."""

    enabled: bool = Field(
        default=False, description="Whether it is used; needs pip install 'ds-core[comet]'."
    )
    samples_log_interval: int = Field(
        default=100,
        ge=1,
        description="Samples between two values of one scalar.",
        json_schema_extra={"unit": "samples"},
    )
    project: str | None = Field(default=None, description="Project of the experiment.")
    workspace: str | None = Field(default=None, description="Workspace of the project.")
    api_key: str | None = Field(
        default=None, description="Key of the account; better left to Comet's own configuration."
    )
    experiment_name: str | None = Field(default=None, description="Name of the experiment.")
    experiment_key: str | None = Field(
        default=None, description="Key of the experiment to go on with, 32 to 50 characters."
    )
    online: bool | None = Field(
        default=None, description="false: stored in a local file; true or null: sent to Comet."
    )
    mode: Literal["get", "create", "get_or_create"] | None = Field(
        default=None,
        description='"get": go on with experiment_key; "create": a new experiment; '
        '"get_or_create" or null: whichever is possible.',
    )


class ThroughputSection(Section):
    """How the time of a step is taken."""

    enabled: bool = Field(
        default=True, description="Whether the time of a step and samples per second are shown."
    )
    synchronized: bool = Field(
        default=True,
        description="Whether the device is waited for before the clock is read; it is read at the "
        "steps that are shown or written only.",
    )


class TimersSection(Section):
    """Clocks around the steps of a run."""

    throughput: ThroughputSection = Field(
        default_factory=ThroughputSection, description="Time of a step and samples per second."
    )


class NvtxSection(Section):
    """NVTX ranges around the phases of each step, for Nsight Systems."""

    enabled: bool = Field(
        default=False, description="Whether they are marked; needs a CUDA build of torch."
    )
