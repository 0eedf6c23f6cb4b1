"""Curricula: which samples wait, what is cut, and that a run resumes with the same samples."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ds_core.data import (
    CurriculumPlan,
    DifficultyMetric,
    FixedDiscrete,
    FixedLinear,
    MetricIndex,
    PlannedLoader,
    SequenceLengthCurriculum,
)
from ds_core.data.curriculum import cut_inputs
from ds_core.errors import DataError, DsError


def index_of(values):
    values = np.asarray(values)
    distinct, counts = np.unique(values, return_counts=True)
    order = np.argsort(values, kind="stable")
    return MetricIndex(order, distinct, np.cumsum(counts), values)


def by_value(values, schedule):
    return DifficultyMetric(schedule, index_of(values))


VALUES = np.arange(40) % 10  # four samples of each difficulty from 0 to 9
RISING = FixedDiscrete((2, 5, 9), (3, 6))


def plan(metrics=None, micro=2, num_samples=40, **options):
    return CurriculumPlan(
        num_samples, metrics or {"m": by_value(VALUES, RISING)}, micro, seed=7, **options
    )


def loader_of(*args, **options):
    return PlannedLoader(list(range(40)), plan(*args, **options))


def take(loader, count):
    batches = loader.forever()
    return [next(batches).tolist() for _ in range(count)]


def test_no_sample_comes_before_its_time():
    batches = take(loader_of(micro=4), 12)
    for step, batch in enumerate(batches, start=1):
        assert VALUES[batch].max() <= RISING(step)
    assert max(VALUES[batch].max() for batch in batches[6:]) > 5


def test_clusters_are_used_in_proportion_and_each_without_repetition():
    batches = take(loader_of({"m": by_value(VALUES, FixedDiscrete((4, 9), (5,)))}, micro=4), 205)
    first = [sample for batch in batches[:5] for sample in batch]
    assert sorted(first) == sorted(np.flatnonzero(VALUES <= 4)), "20 draws of 20 ready samples"
    later = Counter(sample for batch in batches[5:] for sample in batch)
    assert 340 < sum(n for sample, n in later.items() if VALUES[sample] <= 4) < 460, "half of 800"
    assert max(later.values()) - min(later.values()) < 10


def test_a_sample_waits_for_all_of_its_metrics():
    other = np.arange(40) // 10
    metrics = {
        "m": by_value(VALUES, lambda step: 9 if step > 4 else 3),
        "other": by_value(other, lambda step: 3 if step > 2 else 1),
    }
    batches = take(loader_of(metrics, micro=8), 6)
    assert all(VALUES[b].max() <= 3 and other[b].max() <= 1 for b in batches[:2])
    assert all(VALUES[b].max() <= 3 for b in batches[2:4])
    assert any(VALUES[b].max() > 3 for b in batches[4:])


def test_percentiles_admit_a_share_of_the_samples():
    metric = DifficultyMetric(lambda step: 25 if step < 3 else 100, index_of(VALUES), 100)
    batches = take(loader_of({"m": metric}, micro=10), 3)
    easy = set(index_of(VALUES).ordered_samples[:10].tolist())
    assert set(batches[0]) == set(batches[1]) == easy


def test_ranks_and_micro_batches_cut_the_same_step():
    whole = take(loader_of(micro=8), 4)
    parts = [take(loader_of(micro=2, rank=r, num_ranks=2, accumulation=2), 8) for r in range(2)]
    for step in range(4):
        halves = [part[2 * step : 2 * step + 2] for part in parts]
        merged = [halves[i % 2][i // 4][i % 4 // 2] for i in range(8)]
        assert merged == whole[step]


@pytest.mark.parametrize("done", [0, 1, 5, 8, 21])
def test_it_resumes_with_the_next_samples_under_any_number_of_ranks(done):
    first = loader_of(micro=4, accumulation=2)
    batches = first.forever()
    for _ in range(2 * done):
        next(batches)
    state = json.loads(json.dumps(first.state_dict()))
    expected = [sorted(next(batches).tolist() + next(batches).tolist()) for _ in range(4)]
    resumed = [loader_of(micro=4, rank=r, num_ranks=2) for r in range(2)]
    for loader in resumed:
        loader.load_state_dict(state)
    found = [take(loader, 4) for loader in resumed]
    assert [sorted(a + b) for a, b in zip(*found, strict=True)] == expected


def test_it_resumes_in_the_middle_of_a_step():
    first, second = loader_of(accumulation=4), loader_of(accumulation=4)
    batches = first.forever()
    for _ in range(6):
        next(batches)
    second.load_state_dict(first.state_dict())
    assert take(second, 9) == [next(batches).tolist() for _ in range(9)]
    assert second.difficulties == first.difficulties == {"m": 5}


def test_an_epoch_is_as_many_samples_as_the_dataset_has():
    loader = loader_of(micro=4, accumulation=2)
    assert len(list(loader)) == len(loader) == 10
    assert (loader.samples_seen, loader.step_samples, loader.epochs_done) == (40, 8, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plan(num_samples=41), "'m' was measured of 40 samples, and the dataset has 41"),
        (
            lambda: next(plan({"m": by_value(VALUES + 5, RISING)}).epoch(plan().start())),
            r"no sample is as easy as the first difficulties, \{'m': 2\}",
        ),
        (lambda: plan().adopt({**plan().start(), "num_samples": 9}), "had 9 samples when this"),
        (lambda: plan().adopt({"samples_seen": 3}), "another kind of loader"),
    ],
    ids=["other-dataset", "none-easy", "other-size", "other-loader"],
)
def test_what_does_not_fit_is_an_error(make, message):
    with pytest.raises(DsError, match=message):
        make()


def test_data_errors_are_told_apart():
    with pytest.raises(DataError):
        plan(num_samples=41)


TOKENS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize(
    ("value", "name", "shape"),
    [
        (TOKENS, "", (2, 5)),
        (torch.rand(2, 12, 3), "", (2, 5, 3)),
        (torch.ones(2, 12), "attention_mask", (2, 5)),
        (torch.ones(2, 1, 12, 12), "attention_mask", (2, 1, 5, 5)),
        (torch.ones(2, 1, 1, 12), "mask", (2, 1, 1, 5)),
        (torch.ones(12, 12, dtype=torch.bool), "x", (5, 5)),
        (torch.rand(2, 3), "", (2, 3)),
        (torch.rand(12), "", (12,)),
        (torch.tensor(3), "", ()),
        ((TOKENS, [TOKENS]), "", ((2, 5), [(2, 5)])),
        ({"labels": TOKENS, "note": "n"}, "", {"labels": (2, 5), "note": "n"}),
        ("text", "", "text"),
    ],
    ids=[
        "tokens", "states", "mask", "mask-square", "mask-keys", "causal", "classes", "weights",
        "scalar", "nested", "mapping", "other",
    ],
)  # fmt: skip
def test_whatever_has_one_place_per_token_is_cut(value, name, shape):
    def shapes(found):
        if isinstance(found, torch.Tensor):
            return tuple(found.shape)
        if isinstance(found, dict):
            return {key: shapes(item) for key, item in found.items()}
        return type(found)(map(shapes, found)) if isinstance(found, list | tuple) else found

    args, kwargs = cut_inputs((TOKENS,), {name or "value": value}, 5)
    assert torch.equal(args[0], TOKENS[:, :5])
    assert shapes(kwargs[name or "value"]) == shape


def test_inputs_that_are_short_enough_stay():
    args, _ = cut_inputs((TOKENS,), {}, 12)
    assert args[0] is TOKENS


class Reader(nn.Module):
    def forward(self, tokens, curriculum_seqlen=None):
        return curriculum_seqlen


def test_a_model_that_cuts_for_itself_is_told_the_length():
    engine = SimpleNamespace(module=Reader(), global_step=4)
    args, kwargs = SequenceLengthCurriculum(FixedLinear(2, 12, 10)).adjust_inputs(
        engine, (TOKENS,), {}
    )
    assert args[0] is TOKENS
    assert kwargs == {"curriculum_seqlen": 7}
