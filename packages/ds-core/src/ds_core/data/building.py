"""From a config and a dataset to the loader of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from ds_core.data.curriculum import cuts_sequences
from ds_core.data.curriculum_plan import CurriculumPlan, DifficultyMetric
from ds_core.data.loader import Collate, PlannedLoader, ResumableLoader, length_of
from ds_core.data.metric_index import MetricIndex
from ds_core.data.plan import BatchPlan
from ds_core.data.token_batches import TokenBudgetPlan, VariableBatchLR
from ds_core.errors import ConfigError, DataError
from ds_core.seams.observer import Event, EventKind

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.data.config import DataEfficiencySection
    from ds_core.engine import Engine

_CURRICULUM = "data_efficiency.data_sampling.curriculum_learning"
_BATCHING = "data_efficiency.data_sampling.dynamic_batching"


def build_loader(
    config: Config,
    dataset: Dataset[Any],
    *,
    collate_fn: Collate | None = None,
    rank: int = 0,
    num_ranks: int = 1,
) -> PlannedLoader:
    """The loader that a config asks for: shuffled, by a curriculum, or by tokens.

    Args:
        config: its batch sizes, `seed`, `dataloader_drop_last` and `data_efficiency` are used.
        dataset: map-style.
        collate_fn: as torch's DataLoader takes it.
        rank, num_ranks: of the data-parallel group.

    Raises ConfigError or DataError if what the config names is not there or does not fit.
    """
    from ds_core.data.config import DataEfficiencySection

    section = config.section("data_efficiency")
    micro_batch = config.train_micro_batch_size_per_gpu
    if not isinstance(section, DataEfficiencySection) or not section.data_sampling.enabled:
        return ResumableLoader(
            dataset, micro_batch, rank=rank, num_ranks=num_ranks, collate_fn=collate_fn,
            drop_last=config.dataloader_drop_last, seed=config.seed or 0,
        )  # fmt: skip
    sampling = section.data_sampling
    reading: dict[str, Any] = {
        "collate_fn": collate_fn,
        "num_workers": sampling.num_workers,
        "pin_memory": sampling.pin_memory,
        "num_epochs": sampling.num_epochs,
        "seed": section.seed,
    }
    if sampling.curriculum_learning.enabled:
        plan: BatchPlan = _curriculum(config, section, length_of(dataset), rank, num_ranks)
        return _CurriculumLoader(dataset, plan, _without_use(section), **reading)
    if sampling.dynamic_batching.enabled:
        plan = _token_batches(config, section, length_of(dataset), rank, num_ranks)
        return PlannedLoader(dataset, plan, **reading)
    return ResumableLoader(
        dataset, micro_batch, rank=rank, num_ranks=num_ranks,
        drop_last=config.dataloader_drop_last, **reading,
    )  # fmt: skip


def _curriculum(
    config: Config, section: DataEfficiencySection, num_samples: int, rank: int, num_ranks: int
) -> CurriculumPlan:
    metrics = {}
    for name, rule in section.data_sampling.curriculum_learning.curriculum_metrics.items():
        where = f"{_CURRICULUM}.curriculum_metrics.{name}"
        index = None
        if rule.clustering_type == "schedule_based":
            assert rule.index_to_sample_path is not None
            try:
                index = MetricIndex.open(rule.index_to_sample_path, rule.index_to_metric_path)
            except DataError as error:
                raise ConfigError(f"{where}.index_to_sample_path: {error}") from error
        whole = rule.max_difficulty if rule.difficulty_type == "percentile" else None
        metrics[name] = DifficultyMetric(rule.schedule(where), index, whole)
    return CurriculumPlan(
        num_samples, metrics, config.train_micro_batch_size_per_gpu, rank=rank,
        num_ranks=num_ranks, accumulation=config.gradient_accumulation_steps, seed=section.seed,
    )  # fmt: skip


def _token_batches(
    config: Config, section: DataEfficiencySection, num_samples: int, rank: int, num_ranks: int
) -> TokenBudgetPlan:
    rule = section.data_sampling.dynamic_batching
    assert rule.metrics_path is not None
    assert rule.max_tokens is not None
    try:
        index = MetricIndex.open(f"{rule.metrics_path}/seqlen")
    except DataError as error:
        raise ConfigError(
            f"{_BATCHING}.metrics_path: {error}; measure the samples once with "
            f'ds_core.data.analyze(dataset, {{"seqlen": sequence_length}}, {rule.metrics_path!r})'
        ) from error
    if index.by_sample is None or len(index) != num_samples:
        raise ConfigError(
            f"{_BATCHING}.metrics_path: {len(index)} samples were measured, and the dataset has "
            f"{num_samples}: analyze this dataset"
        )
    return TokenBudgetPlan(
        index.by_sample, rule.max_tokens, rank=rank, num_ranks=num_ranks,
        accumulation=config.gradient_accumulation_steps, min_samples=rule.min_batch_size,
        max_samples=rule.max_batch_size, order=rule.sequence_picking_order, seed=section.seed,
        verbose=rule.verbose,
    )  # fmt: skip


def _without_use(section: DataEfficiencySection) -> list[str]:
    """Metrics for which no sample waits and that nothing of ours uses."""
    metrics = section.data_sampling.curriculum_learning.curriculum_metrics
    return [
        name
        for name, rule in metrics.items()
        if rule.clustering_type == "single_cluster"
        and not cuts_sequences(name, rule.clustering_type)
    ]


class _CurriculumLoader(PlannedLoader):
    """Refuses to hand out batches while a metric of the curriculum does nothing."""

    def __init__(
        self, dataset: Dataset[Any], plan: BatchPlan, without_use: list[str], **reading: Any
    ) -> None:
        super().__init__(dataset, plan, **reading)
        self._without_use = without_use

    def __iter__(self) -> Iterator[Any]:
        if self._without_use and self.post_process is None:
            raise ConfigError(
                f"{_CURRICULUM}.curriculum_metrics.{self._without_use[0]}: single_cluster, so no "
                f"sample waits for it, and nothing uses its difficulty; set "
                f"engine.dataloader.post_process to a function (batch, difficulties) -> batch"
            )
        return super().__iter__()


class BatchLrObserver:
    """Makes an engine's learning rate follow the samples of each step; see `VariableBatchLR`.

    Args:
        base_samples: samples per step that the rates of the config are meant for.
        scaling: "linear", "sqrt" or "none".
    """

    def __init__(self, base_samples: int, scaling: Any) -> None:
        self._base_samples, self._scaling = base_samples, scaling

    def on_event(self, engine: Engine, event: Event) -> None:
        """Wrap the engine's schedule at the start, and scale it as each step begins."""
        if event.kind is EventKind.START:
            if engine.dataloader is None:
                raise ConfigError(f"{_BATCHING}: initialize() has no training_data to pack")
            engine.lr_scheduler = VariableBatchLR(
                engine.sharding, engine.lr_scheduler,
                base_samples=self._base_samples, scaling=self._scaling,
            )  # fmt: skip
        elif event.kind is EventKind.STEP_BEGIN and engine.dataloader.step_samples is not None:
            engine.lr_scheduler.begin(engine.dataloader.step_samples)


def batch_lr_observer(config: Config) -> BatchLrObserver | None:
    """What scales the learning rate, if a config packs batches by tokens."""
    from ds_core.data.config import DataEfficiencySection

    section = config.section("data_efficiency")
    if not isinstance(section, DataEfficiencySection):
        return None
    rule = section.data_sampling.dynamic_batching
    if not rule.enabled or rule.lr_scaling_method == "none":
        return None
    return BatchLrObserver(config.train_batch_size, rule.lr_scaling_method)
