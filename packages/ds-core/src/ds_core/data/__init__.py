"""The data of a run: loaders that resume exactly, curricula, analysis, token files, batch sizes.

loader = ds_core.data.ResumableLoader(dataset, micro_batch_size=8, num_workers=2)
for batch in loader.forever(): ...
state = loader.state_dict()        # JSON-able; goes on under any number of ranks
"""

from ds_core.data.analyzer import analyze
from ds_core.data.building import build_loader
from ds_core.data.curriculum import SequenceLengthCurriculum
from ds_core.data.curriculum_plan import CurriculumPlan, DifficultyMetric
from ds_core.data.loader import PlannedLoader, RepeatingLoader, ResumableLoader
from ds_core.data.megatron import MegatronTokens
from ds_core.data.metric_index import MetricIndex
from ds_core.data.metrics import SampleLoss, VocabularyRarity, count_tokens, sequence_length
from ds_core.data.schedule import FixedDiscrete, FixedLinear, FixedRoot
from ds_core.data.token_batches import TokenBudgetPlan, VariableBatchLR, pad_collate
from ds_core.data.token_dataset import TokenDataset, TokenWindows, write_tokens

__all__ = [
    "CurriculumPlan",
    "DifficultyMetric",
    "FixedDiscrete",
    "FixedLinear",
    "FixedRoot",
    "MegatronTokens",
    "MetricIndex",
    "PlannedLoader",
    "RepeatingLoader",
    "ResumableLoader",
    "SampleLoss",
    "SequenceLengthCurriculum",
    "TokenBudgetPlan",
    "TokenDataset",
    "TokenWindows",
    "VariableBatchLR",
    "VocabularyRarity",
    "analyze",
    "build_loader",
    "count_tokens",
    "pad_collate",
    "sequence_length",
    "write_tokens",
]
