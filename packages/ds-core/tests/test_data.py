"""The loader: every sample once per epoch over all ranks, and resumption at the next sample."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch

from ds_core.data import ResumableLoader
from ds_core.errors import DsError


def loaders(num_samples, num_ranks=2, micro_batch_size=2, **options):
    dataset = list(range(num_samples))
    return [
        ResumableLoader(dataset, micro_batch_size, rank=rank, num_ranks=num_ranks, **options)
        for rank in range(num_ranks)
    ]


def epoch(loader):
    return [sample for batch in loader for sample in batch.tolist()]


@pytest.mark.parametrize(("num_samples", "num_ranks"), [(16, 1), (16, 2), (12, 3), (8, 4)])
def test_an_epoch_covers_every_sample_once(num_samples, num_ranks):
    seen = [epoch(loader) for loader in loaders(num_samples, num_ranks)]
    assert sorted(itertools.chain(*seen)) == list(range(num_samples))
    assert len({len(samples) for samples in seen}) == 1


@pytest.mark.parametrize(("num_samples", "num_ranks"), [(7, 2), (10, 3), (5, 4), (1, 4), (3, 4)])
def test_an_uneven_tail_repeats_as_few_samples_as_it_must(num_samples, num_ranks):
    seen = [epoch(loader) for loader in loaders(num_samples, num_ranks)]
    assert len({len(samples) for samples in seen}) == 1, "ranks must not run out of step"
    counts = collections.Counter(itertools.chain(*seen))
    assert sorted(counts) == list(range(num_samples))
    assert sum(counts.values()) - num_samples < num_ranks


def test_the_last_batch_may_be_smaller_or_dropped():
    kept = [len(batch) for batch in loaders(10, 1, 4)[0]]
    dropped = [len(batch) for batch in loaders(10, 1, 4, drop_last=True)[0]]
    assert (kept, dropped) == ([4, 4, 2], [4, 4])
    assert len(loaders(10, 1, 4)[0]) == 3


def test_epochs_are_shuffled_differently_and_alike_for_a_seed():
    first, second, other = loaders(12, 1)[0], loaders(12, 1)[0], loaders(12, 1, seed=5)[0]
    one, two = epoch(first), epoch(first)
    assert one != two
    assert sorted(one) == sorted(two)
    assert (epoch(second), epoch(second)) == (one, two)
    assert epoch(other) != one


@pytest.mark.parametrize("num_batches", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize("num_samples", [16, 15], ids=["even", "uneven"])
def test_it_resumes_with_the_next_sample(num_samples, num_batches):
    for rank in range(2):
        whole, resumed = (loaders(num_samples)[rank] for _ in range(2))
        batches = whole.forever()
        for _ in range(num_batches):
            next(batches)
        resumed.skip_to(whole.samples_seen)
        again = resumed.forever()
        for _ in range(6):
            assert next(again).tolist() == next(batches).tolist()
        assert resumed.samples_seen == whole.samples_seen


def test_iterating_goes_on_with_the_rest_of_the_epoch():
    loader = loaders(16, 1)[0]
    whole = epoch(loaders(16, 1)[0])
    started = [next(iter(loader)).tolist() for _ in range(2)]
    assert started == [whole[:2], whole[2:4]]
    assert epoch(loader) == whole[4:]


def test_it_resumes_at_another_world_size():
    first = loaders(16, 2)
    for loader in first:
        next(loader.forever())
    resumed = loaders(16, 1)[0]
    resumed.skip_to(first[0].samples_seen)
    started = [sample for loader in loaders(16, 2) for sample in next(iter(loader)).tolist()]
    assert sorted(started + epoch(resumed)) == list(range(16))


def test_it_leaves_the_random_numbers_of_the_model_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    epoch(loaders(8)[0])
    assert torch.equal(torch.rand(3), expected)


def test_a_collate_function_makes_the_batches():
    loader = loaders(4, 1, collate_fn=lambda samples: {"n": len(samples)})[0]
    assert list(loader) == [{"n": 2}, {"n": 2}]


@pytest.mark.parametrize(
    ("num_samples", "options", "message"),
    [
        (0, {}, "the dataset is empty"),
        (2, {"drop_last": True}, "2 samples are less than one micro-batch of 2 on each of 2"),
    ],
    ids=["empty", "too-few"],
)
def test_a_dataset_that_gives_no_batch_is_an_error(num_samples, options, message):
    with pytest.raises(DsError, match=message):
        loaders(num_samples, **options)


def test_a_dataset_without_length_is_an_error():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(DsError, match=r"training_data: .*Stream.*train_batch"):
        ResumableLoader(Stream(), 1)
