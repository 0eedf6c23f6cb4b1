"""The data sections of a config: what is refused, and what an engine does with the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import ds_core
from ds_core import comm, config
from ds_core.data import VariableBatchLR, analyze, pad_collate, sequence_length
from ds_core.errors import ConfigError
from ds_core.testing import run_ranks

#: Python 3.12 warns of fork in a process with threads, which is how torch starts its workers.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be on "
    "his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered the rightful property of some one or other of "
    "their daughters."
)
BASE = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
    "seed": 5,
}


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


class Words(Dataset):
    """Sentences of real text as bytes; windows of 16 of them if `length` is given."""

    def __init__(self, length=None):
        data = list(TEXT.encode())
        self.samples = [list(line.encode()) for line in TEXT.split(", ") for _ in range(3)]
        if length is not None:
            self.samples = [data[i : i + length] for i in range(0, len(data) - length, length)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return torch.tensor(self.samples[index])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.seen = nn.Embedding(256, 4), []

    def forward(self, tokens):
        self.seen.append(tokens.tolist())
        return self.embed(tokens).square().mean()


def metric(**changes):
    return {
        "difficulty_type": "value", "clustering_type": "single_cluster", "min_difficulty": 4,
        "max_difficulty": 16, "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 3, "difficulty_step": 4}, **changes,
    }  # fmt: skip


def sampling(**sections):
    return {
        **BASE,
        "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True, **sections}},
    }


def curriculum(**metrics):
    return sampling(curriculum_learning={"enabled": True, "curriculum_metrics": metrics})


def engine_of(document, dataset, **options):
    torch.manual_seed(0)
    return ds_core.initialize(Net(), document, training_data=dataset, **options)


LEGACY = {
    "enabled": True, "curriculum_type": "seqlen", "min_difficulty": 4, "max_difficulty": 16,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 3, "difficulty_step": 4},
}  # fmt: skip


def lengths_of(engine, steps):
    engine.module.seen.clear()
    for _ in range(steps):
        engine.train_batch()
    return [len(batch[0]) for batch in engine.module.seen]


@pytest.mark.parametrize(
    "document",
    [{**BASE, "curriculum_learning": LEGACY}, curriculum(seqlen=metric())],
    ids=["legacy", "data_efficiency"],
)
def test_sequences_grow_in_training_and_are_whole_in_evaluation(document):
    engine = engine_of(document, Words(16))
    assert lengths_of(engine, 4) == [8, 12, 16, 16]
    engine.global_step = 0
    engine.eval()
    engine(torch.zeros(1, 16, dtype=torch.long))
    assert len(engine.module.seen[-1][0]) == 16


def test_a_function_on_the_python_path_sets_the_difficulty():
    rule = {"function": "operator:index"}  # the step itself
    found = {**LEGACY, "schedule_type": "custom", "schedule_config": rule}
    engine = engine_of({**BASE, "curriculum_learning": found}, Words(16))
    assert lengths_of(engine, 3) == [1, 2, 3]


def vowels(sample):
    return sum(chr(value) in "aeiou" for value in sample.tolist())


def vowel_curriculum(folder, **changes):
    rule = metric(
        clustering_type="schedule_based", index_to_sample_path=str(folder / "vowels"),
        difficulty_type="percentile", min_difficulty=20, max_difficulty=100,
        schedule_config={"total_curriculum_step": 6, "difficulty_step": 10},
    )  # fmt: skip
    return curriculum(vowels={**rule, **changes})


def test_hard_samples_wait_and_a_run_resumes_with_the_same_ones(tmp_path):
    dataset = Words(16)
    index = analyze(dataset, {"vowels": vowels}, tmp_path / "metrics")["vowels"]
    first = engine_of(vowel_curriculum(tmp_path / "metrics"), dataset)
    losses = [float(first.train_batch()) for _ in range(5)]
    easy = [dataset[int(i)].tolist() for i in index.ordered_samples[: len(dataset) * 3 // 10]]
    assert all(sample in easy for sample in first.module.seen[0])
    assert first.dataloader.difficulties == {"vowels": 80}
    first.save_checkpoint(tmp_path)
    expected = [float(first.train_batch()) for _ in range(6)]
    second = engine_of(vowel_curriculum(tmp_path / "metrics"), dataset)
    second.load_checkpoint(tmp_path)
    assert [float(second.train_batch()) for _ in range(6)] == expected
    assert len(losses) == 5


def test_a_metric_for_which_nothing_waits_must_be_used(tmp_path):
    engine = engine_of(curriculum(noise=metric()), Words(16))
    with pytest.raises(ConfigError, match=r"noise: single_cluster, .*post_process"):
        engine.train_batch()
    engine.dataloader.post_process = lambda batch, told: batch[:, : told["noise"]]
    engine._batches = None
    assert lengths_of(engine, 2) == [8, 12]


def packed(folder, **changes):
    rule = {
        "enabled": True, "metrics_path": str(folder), "max_tokens": 130,
        "sequence_picking_order": "random", **changes,
    }  # fmt: skip
    return sampling(dynamic_batching=rule)


@pytest.mark.parametrize(("method", "power"), [("linear", 1), ("sqrt", 0.5), ("none", 0)])
def test_batches_by_tokens_set_the_learning_rate(tmp_path, method, power):
    analyze(Words(), {"seqlen": sequence_length}, tmp_path)
    document = packed(tmp_path, lr_scaling_method=method)
    rates = []

    class Watch:
        def on_event(self, engine, event):
            if event.kind.value == "step_end":
                rates.append((event.values["lr"], engine.dataloader.step_samples))

    engine = engine_of(document, Words(), collate_fn=pad_collate(), observers=(Watch(),))
    for _ in range(6):
        engine.train_batch()
    assert len({samples for _, samples in rates}) > 1
    assert [lr for lr, _ in rates] == pytest.approx([0.01 * (n / 2) ** power for _, n in rates])
    assert all(
        sum(value > 0 for line in batch for value in line) <= 130 for batch in engine.module.seen
    )


def test_batches_by_tokens_resume(tmp_path):
    analyze(Words(), {"seqlen": sequence_length}, tmp_path / "metrics")
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 9}}
    document = {**packed(tmp_path / "metrics"), "scheduler": scheduler}
    first = engine_of(document, Words(), collate_fn=pad_collate())
    for _ in range(3):
        first.train_batch()
    first.save_checkpoint(tmp_path)
    expected = [float(first.train_batch()) for _ in range(7)]
    second = engine_of(document, Words(), collate_fn=pad_collate())
    second.load_checkpoint(tmp_path)
    assert [float(second.train_batch()) for _ in range(7)] == expected
    assert isinstance(second.lr_scheduler, VariableBatchLR)


def steps_on_rank(document):
    engine = engine_of(document, Words(), collate_fn=pad_collate())
    taken = sum(1 for _ in engine.dataloader)
    return taken, len(engine.dataloader)


def test_ranks_take_as_many_batches_by_tokens(tmp_path):
    analyze(Words(), {"seqlen": sequence_length}, tmp_path)
    found = run_ranks(2, steps_on_rank, packed(tmp_path))
    assert found[0] == found[1]
    assert found[0][0] == found[0][1]


def test_reading_is_as_the_section_says():
    document = sampling(num_epochs=2, num_workers=1, pin_memory=True)
    engine = engine_of(document, Words(16))
    count = len(engine.dataloader)
    assert sum(1 for _ in engine.dataloader.forever()) == 2 * count
    assert engine.dataloader.epochs_done == 2


INCOMPLETE = {
    "schedule": (
        {"curriculum_learning": {"enabled": True}},
        r"curriculum_learning: schedule_type is missing",
    ),
    "rule": (
        {"curriculum_learning": {**LEGACY, "schedule_type": "fixed_root"}},
        r'schedule_type "fixed_root" needs schedule_config.root_degree',
    ),
    "surplus": (
        {"curriculum_learning": {**LEGACY, "schedule_type": "fixed_discrete"}},
        r'"fixed_discrete" does not use schedule_config.total_curriculum_step',
    ),
    "backwards": (
        {"curriculum_learning": {**LEGACY, "max_difficulty": 2}},
        r"the maximum 2 is below the minimum 4",
    ),
    "type": (
        {"curriculum_learning": {**LEGACY, "curriculum_type": "voc"}},
        r'curriculum_learning.curriculum_type: got "voc", expected "seqlen"',
    ),
    "parent": (
        {"data_efficiency": {"data_routing": {"enabled": True}}},
        r"data_efficiency: data_routing is enabled, but data_efficiency is not",
    ),
    "no-index": (curriculum(m=metric(clustering_type="schedule_based")), "index_to_sample_path is"),
    "no-metric": (curriculum(), "curriculum_metrics names none"),
    "no-budget": (sampling(dynamic_batching={"enabled": True}), "max_tokens is missing"),
    "limits": (
        sampling(dynamic_batching={"min_batch_size": 4, "max_batch_size": 2}),
        "max_batch_size 2 is below min_batch_size 4",
    ),
    "both": (
        sampling(
            dynamic_batching={"enabled": True, "max_tokens": 9, "metrics_path": "x"},
            curriculum_learning={"enabled": True, "curriculum_metrics": {"seqlen": metric()}},
        ),
        "both decide which samples make a batch",
    ),
    "theta": (
        {"progressive_layer_drop": {"enabled": True, "theta": 0}},
        "progressive_layer_drop.theta: got 0, expected a number > 0 and <= 1",
    ),
    "layer-lr": (
        {"data_efficiency": {"data_routing": {"random_ltd": {
            "layer_token_lr_schedule": {"enabled": True}}}}},
        "DeepSpeed never implemented",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("document", "message"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_what_cannot_be_honoured_is_refused(document, message):
    with pytest.raises(ConfigError, match=message):
        config.load({**BASE, **document})


def ltd(**changes):
    rule = {
        "enabled": True, "total_layer_num": 4, "random_ltd_layer_id": [1, 2],
        "random_ltd_schedule": {
            "min_value": 8, "max_value": 16,
            "schedule_config": {"require_steps": 9, "seq_per_step": 4},
        }, **changes,
    }  # fmt: skip
    routing = {"enabled": True, "random_ltd": rule}
    return {**BASE, "data_efficiency": {"enabled": True, "data_routing": routing}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_layer_num": None}, "enabled, but total_layer_num missing"),
        ({"random_ltd_layer_id": [1, 4]}, "names 4, and there are 4 layers"),
        ({"random_ltd_layer_num": 3}, "names 2 different layers, and random_ltd_layer_num is 3"),
        ({"random_ltd_schedule": {}}, "random_ltd_schedule.min_value, random_ltd_schedule.max"),
        ({"hidden_state_order": "dim_seq_batch"}, "expected one of batch_seq_dim, seq_batch_dim"),
    ],
    ids=["layers", "range", "number", "schedule", "order"],
)
def test_an_incomplete_token_dropping_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config.load(ltd(**changes))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (curriculum(m=metric(clustering_type="schedule_based", index_to_sample_path="nowhere/m")),
         r"curriculum_metrics.m.index_to_sample_path: 'nowhere' is no ds-core metric"),
        (packed("nowhere"), r"dynamic_batching.metrics_path: .*measure the samples once"),
        ({**curriculum(seqlen=metric()), "curriculum_learning": LEGACY},
         r"curriculum_learning and data_efficiency\S+seqlen: both cut sequences"),
    ],
    ids=["no-index", "no-lengths", "twice"],
)  # fmt: skip
def test_what_is_not_there_is_an_error_when_the_engine_starts(document, message):
    with pytest.raises(ConfigError, match=message):
        engine_of(document, Words(16))


def test_batches_by_tokens_need_a_dataset(tmp_path):
    with pytest.raises(ConfigError, match="initialize\\(\\) has no training_data to pack"):
        ds_core.initialize(Net(), packed(tmp_path))
