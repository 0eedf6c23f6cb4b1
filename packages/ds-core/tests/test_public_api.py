"""The public names: adding or removing one is a decision, not an accident."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import ds_core
import ds_core.testing
from ds_core import comm, ops, seams
from ds_core.testing import contracts

NAMES = {
    "ds_core": [
        "DsError", "Engine", "LossScale", "Precision", "__version__", "accelerator", "checkpoint",
        "comm", "config", "data", "efficiency", "initialize", "observers", "ops", "seams",
    ],
    "ds_core.activation_checkpointing": [
        "CheckpointedBlocks", "HostOffload", "Policy", "RngStates", "StoredInputs", "checkpoint",
        "checkpoint_blocks", "model_parallel_seed", "store_inputs",
    ],
    "ds_core.data": [
        "CurriculumPlan", "DifficultyMetric", "FixedDiscrete", "FixedLinear", "FixedRoot",
        "MegatronTokens", "MetricIndex", "PlannedLoader", "RepeatingLoader", "ResumableLoader",
        "SampleLoss", "SequenceLengthCurriculum", "TokenBudgetPlan", "TokenDataset", "TokenWindows",
        "VariableBatchLR", "VocabularyRarity", "analyze", "build_loader", "count_tokens",
        "pad_collate", "sequence_length", "write_tokens",
    ],
    "ds_core.efficiency": [
        "ProgressiveLayerDrop", "RandomLTD", "RandomLTDObserver", "convert_to_random_ltd",
        "theta_at",
    ],
    "ds_core.comm": [
        "Group", "Ledger", "LedgerRow", "Mesh", "Pending", "Placement", "Span", "Traffic",
        "TrafficRow", "TrafficSummary", "UnevenBatches", "WeightedBatch", "all_gather",
        "all_gather_coalesced", "all_gather_object", "all_gather_uneven", "all_reduce",
        "all_reduce_coalesced", "all_rows", "all_to_all", "all_to_all_uneven", "barrier",
        "broadcast", "broadcast_object", "exchange", "gather", "gather_object", "init",
        "is_initialized",
        "monitored_barrier", "place", "placement_of", "recv", "reduce", "reduce_scatter",
        "reduce_scatter_coalesced", "reduce_scatter_uneven", "scatter", "scatter_object", "send",
        "shutdown",
    ],
    "ds_core.seams": [
        "Dense", "Event", "EventKind", "FullValues", "Implementation", "InputAdjuster",
        "KernelSource", "Observer", "Op", "OpTools", "ParkableSharding", "PassingState",
        "ReleasableSharding", "Runner", "Sequential", "Sharding", "ShardingFactory", "TensorFile",
        "TensorFiles", "TensorFilesFactory", "Transfer", "Transport", "change_freely", "tearing",
    ],
    "ds_core.observers": [
        "Comet", "CsvFiles", "JsonLines", "MemoryByPhase", "Metrics", "NvtxRanges", "Progress",
        "Record", "Sink", "TensorBoard", "Throughput", "Wandb", "standard_observers",
    ],
    "ds_core.tracing": [
        "Overlap", "RankTrace", "Recorder", "Slice", "Trace", "load_folder", "merge", "overlap_of",
        "record",
    ],
    "ds_core.ops": [
        "available", "catalog", "choose", "define", "get", "implementations", "names", "run",
        "select", "use",
    ],
    "ds_core.testing": [
        "Died", "Fault", "FaultInjector", "Hung", "ObserverContract", "OpContract", "Raised",
        "RankFailure", "RankPool", "Returned", "RunnerContract", "ShardingContract", "TaskError",
        "TransportContract", "die", "die_on_call", "fake_world", "file_size_limit", "flip_byte",
        "free_port", "poisoned_empty", "run_ranks", "shared_pool", "truncate",
    ],
    "ds_core.testing.contracts": [
        "ObserverContract", "OpContract", "RunnerContract", "ShardingContract",
        "TensorFilesContract", "TransportContract",
    ],
}  # fmt: skip


@pytest.mark.parametrize("module", NAMES)
def test_public_names_are_pinned(module):
    assert sorted(importlib.import_module(module).__all__) == sorted(NAMES[module])


@pytest.mark.parametrize("module", [ds_core, comm, ops, seams, ds_core.testing, contracts])
def test_every_public_name_can_be_had(module):
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)


@pytest.mark.parametrize("module", [ds_core, ds_core.testing])
def test_an_unknown_name_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = module.nonsense


def test_every_public_name_has_a_docstring():
    for module in (ds_core, comm, ops, seams, ds_core.testing):
        for name in module.__all__:
            assert name == "__version__" or getattr(module, name).__doc__, (module.__name__, name)


def test_the_test_kit_needs_pytest_only_for_the_contracts():
    program = (
        "import sys; sys.modules['pytest'] = None\n"
        "import ds_core.testing\n"
        "assert 'ds_core.engine' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
