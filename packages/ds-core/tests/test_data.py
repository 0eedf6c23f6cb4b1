"""The loader: every sample once per epoch over all ranks, and resumption at the next sample."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch

from ds_core.data import RepeatingLoader, ResumableLoader
from ds_core.errors import DsError

#: Python 3.12 warns of fork in a process with threads, which is how torch starts its workers.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


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


@pytest.mark.parametrize("drop_last", [False, True], ids=["kept", "dropped"])
@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 4), (1, 3)), ((2, 2), (1, 5)), ((1, 3), (2, 2)), ((4, 1), (3, 2))],
    ids=["batch", "fewer-ranks", "more-ranks", "both"],
)
def test_no_sample_is_lost_or_repeated_when_batch_or_ranks_change(before, after, drop_last):
    first = loaders(36, *before)
    seen = [next(loader.forever()).tolist() for loader in first]
    states = [loader.state_dict() for loader in first]
    resumed = loaders(36, *after, drop_last=drop_last)
    for loader in resumed:
        loader.load_state_dict(states[0])
    rest = [epoch(loader) for loader in resumed]
    counts = collections.Counter(itertools.chain(*seen, *rest))
    left_out = 36 - len(counts)
    assert left_out < (after[0] * after[1] if drop_last else 1)
    assert sum(counts.values()) - len(counts) < after[0], "but for what evens out the ranks"
    assert all(loader.epochs_done == 1 for loader in resumed)
    assert [sorted(set(epoch(loader))) for loader in loaders(36, 1, 36)] == [list(range(36))]


def test_a_rest_that_fills_no_batch_begins_the_next_epoch():
    loader = loaders(10, 1, 2)[0]
    for _ in range(4):
        next(iter(loader))
    larger = loaders(10, 1, 4, drop_last=True)[0]
    larger.load_state_dict(loader.state_dict())
    next(larger.forever())
    assert larger.samples_seen == 14


def test_worker_processes_give_the_same_batches_and_resume_at_the_same_one():
    plain, parallel = loaders(13, 1)[0], loaders(13, 1, num_workers=2)[0]
    assert [b.tolist() for b in parallel] == [b.tolist() for b in plain]
    batches = parallel.forever()
    expected = [next(batches).tolist() for _ in range(3)]
    plain.load_state_dict(parallel.state_dict())
    assert plain.samples_seen == 13 + 6, "what workers read ahead is not seen"
    assert next(plain.forever()).tolist() == next(batches).tolist()
    assert len(expected[0]) == 2


def test_an_order_of_the_dataset_s_own_and_an_end_after_some_epochs():
    loader = loaders(5, 1, shuffles=False, num_epochs=2)[0]
    assert [b.tolist() for b in loader.forever()] == [[0, 1], [2, 3], [4]] * 2


def test_a_dataset_of_another_size_begins_a_new_epoch_and_says_so(caplog):
    loader = loaders(16, 1)[0]
    next(iter(loader))
    grown = loaders(20, 1)[0]
    grown.load_state_dict(loader.state_dict())
    assert grown.samples_seen == 20
    assert "had 16 samples when this was saved and has 20: epoch 1 begins anew" in caplog.text


def test_the_state_of_another_kind_of_loader_is_refused():
    with pytest.raises(DsError, match=r"lacks num_samples, samples_seen, seed \(it has step\)"):
        loaders(4)[0].load_state_dict({"step": 3})


def test_post_processing_changes_each_batch():
    loader = loaders(4, 1)[0]
    loader.post_process = lambda batch, difficulties: (batch * 0, difficulties)
    assert [(b.tolist(), d) for b, d in loader] == [([0, 0], {})] * 2


def test_a_repeating_loader_goes_round_and_tells_the_sampler():
    sampler = torch.utils.data.DistributedSampler(range(4), num_replicas=1, rank=0)
    batches = RepeatingLoader(torch.utils.data.DataLoader(range(4), 2, sampler=sampler))
    seen = [next(batches).tolist() for _ in range(5)]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == [0, 1, 2, 3]
    assert (batches.epoch, sampler.epoch, len(batches)) == (2, 2, 2)


def test_a_repeating_loader_over_an_iterator_says_what_is_wrong():
    batches = RepeatingLoader(iter([1]))
    assert next(batches) == 1
    with pytest.raises(DsError, match="pass 2 over a list_iterator gave no batch"):
        next(batches)


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
