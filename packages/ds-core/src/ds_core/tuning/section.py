"""The `autotuning` section: what `ds tune` searches, and for how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.config import JsonDict

from ds_core.config.section import Only, Section, refusal

_SAMPLES: JsonDict = {"unit": "samples"}
_STEPS: JsonDict = {"unit": "steps"}


class AutotuningSection(Section):
    """How `ds tune` searches. Training itself never reads it."""

    enabled: bool = Field(
        default=False,
        description="Makes no difference: `ds tune` searches when it is called, training never.",
    )
    fast: bool = Field(
        default=True,
        description="true: a search in few, short runs; false: every point that fits is measured.",
    )
    results_dir: str = Field(
        default="autotuning_results", description="Folder of the results and the best config."
    )
    exps_dir: str = Field(
        default="autotuning_exps", description="Folder of the trials: config, output, result."
    )
    overwrite: bool = Field(
        default=True,
        description="Whether earlier results are dropped; false: trials that have one are not run "
        "again.",
    )
    metric: Literal["throughput", "latency", "flops"] = Field(
        default="throughput",
        description="What is best: most samples per second, the shortest step, or most operations "
        "per second.",
    )
    start_profile_step: int = Field(
        default=3, ge=1, description="Steps before time is taken.", json_schema_extra=_STEPS
    )
    end_profile_step: int = Field(
        default=5,
        ge=2,
        description="The last step of a short run; the finalists run longer.",
        json_schema_extra=_STEPS,
    )
    tuner_type: Literal["model_based", "gridsearch", "random"] = Field(
        default="model_based",
        description="Which points are measured: those that a cost model, corrected by each run, "
        "finds best; or all in order or at random. DeepSpeed's default is gridsearch.",
    )
    tuner_early_stopping: int = Field(
        default=5,
        ge=0,
        description="Runs without an improvement after which no new point is tried; 0: never.",
    )
    tuner_num_trials: int = Field(default=50, gt=0, description="Runs at most.")
    max_train_batch_size: int | None = Field(
        default=None,
        gt=0,
        description="Largest global batch, where the config does not fix it; null: no limit.",
        json_schema_extra=_SAMPLES,
    )
    min_train_batch_size: int = Field(
        default=1,
        gt=0,
        description="Smallest global batch, where the config does not fix it.",
        json_schema_extra=_SAMPLES,
    )
    max_train_micro_batch_size_per_gpu: int = Field(
        default=1024, gt=0, description="Largest micro-batch.", json_schema_extra=_SAMPLES
    )
    min_train_micro_batch_size_per_gpu: int = Field(
        default=1, gt=0, description="Smallest micro-batch.", json_schema_extra=_SAMPLES
    )
    num_tuning_micro_batch_sizes: int = Field(
        default=3,
        gt=0,
        description="How many micro-batches are tried per stage: the largest that fit.",
    )
    mp_size: Annotated[
        int, Only(1, because="ds-pipe will bring model parallelism; remove the key")
    ] = Field(default=1, description="Only 1: every rank has data of its own.")
    arg_mappings: Annotated[
        dict[str, Any] | None,
        Only(None, {}, because="a trial's config is handed over as a whole; remove the key"),
    ] = Field(default=None, description="Only null: the trial is given a whole config.")
    metric_path: Annotated[
        str | None,
        Only(None, because="a trial measures itself; its result is in exps_dir"),
    ] = Field(default=None, description="Only null: a trial measures itself.")
    model_info: Annotated[
        dict[str, Any] | None,
        Only(None, because="the model is built without data and counted; remove the key"),
    ] = Field(default=None, description="Only null: the model is counted.")
    model_info_path: Annotated[
        str | None,
        Only(None, because="the model is built without data and counted; remove the key"),
    ] = Field(default=None, description="Only null: the model is counted.")

    @model_validator(mode="after")
    def _check_ranges(self) -> AutotuningSection:
        if self.end_profile_step <= self.start_profile_step:
            raise refusal(
                f"end_profile_step {self.end_profile_step} must be above start_profile_step "
                f"{self.start_profile_step}: time is taken in between"
            )
        if self.max_train_micro_batch_size_per_gpu < self.min_train_micro_batch_size_per_gpu:
            raise refusal("max_train_micro_batch_size_per_gpu is below the smallest")
        return self
