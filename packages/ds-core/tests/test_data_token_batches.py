"""Batches by tokens: budgets, ranks in step, resumption, and the learning rate that follows."""

from __future__ import annotations

import collections
import itertools
import logging

import numpy as np
import pytest
import torch

from ds_core.data import PlannedLoader, TokenBudgetPlan, VariableBatchLR, pad_collate
from ds_core.data.token_batches import lr_factor
from ds_core.errors import DataError, DsError

LENGTHS = np.random.default_rng(0).integers(3, 60, 101)


def plans(num_ranks=2, max_tokens=128, lengths=LENGTHS, **options):
    return [
        TokenBudgetPlan(lengths, max_tokens, rank=rank, num_ranks=num_ranks, **options)
        for rank in range(num_ranks)
    ]


def batches_of(plan, state=None):
    return [planned.indices for planned in plan.epoch(state or plan.start())]


@pytest.mark.parametrize("order", ["dataloader", "random", "seqlen", "bucketed"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_samples_come_once_within_the_budget_but_for_a_tail_too_small_to_share(
    order, accumulation, num_ranks
):
    taken = [batches_of(p) for p in plans(num_ranks, order=order, accumulation=accumulation)]
    assert len({len(batches) for batches in taken}) == 1, "ranks must not run out of step"
    assert len(taken[0]) % accumulation == 0
    assert len(taken[0]) == len(plans(num_ranks, order=order, accumulation=accumulation)[0])
    everything = list(itertools.chain(*itertools.chain(*taken)))
    assert len(set(everything)) == len(everything) > 101 - num_ranks * accumulation
    assert all(LENGTHS[batch].sum() <= 128 for batches in taken for batch in batches)


def test_orders_are_what_they_say():
    in_order = list(itertools.chain(*batches_of(plans(1)[0])))
    ascending = list(itertools.chain(*batches_of(plans(1, order="seqlen")[0])))
    shuffled = plans(1, order="random")[0]
    second = {**shuffled.start(), "samples_seen": 101}
    assert in_order == list(range(101))
    assert LENGTHS[ascending].tolist() == sorted(LENGTHS.tolist())
    assert batches_of(shuffled) != batches_of(shuffled, second)
    assert batches_of(shuffled) == batches_of(plans(1, order="random")[0])


def padding(batches):
    used = sum(LENGTHS[batch].sum() for batch in batches)
    return sum(len(batch) * LENGTHS[batch].max() for batch in batches) / used - 1


def test_neighbours_of_like_length_need_little_padding():
    found = {
        order: padding(batches_of(plans(1, order=order)[0])) for order in ("random", "bucketed")
    }
    assert found["bucketed"] < 0.5 * found["random"]


def test_limits_on_samples_are_kept():
    batches = batches_of(plans(1, max_samples=2, min_samples=2)[0])
    assert {len(batch) for batch in batches} == {2}


def test_longer_samples_are_left_out_and_told(caplog):
    plan = plans(1, max_tokens=50)[0]
    longest = int(np.argmax(LENGTHS))
    count = int((LENGTHS > 50).sum())
    assert sorted(itertools.chain(*batches_of(plan))) == np.flatnonzero(LENGTHS <= 50).tolist()
    assert f"{count} of 101 samples have more than max_tokens = 50" in caplog.text
    assert f"sample {longest} with {LENGTHS[longest]}" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plans(1, 100, [60, 60, 3], min_samples=2), "samples 0 to 1 have more than"),
        (lambda: plans(4, 100, [5, 5]), "2 samples do not fill one step of 4 micro-batches"),
        (
            lambda: plans(1)[0].adopt({**plans(1)[0].start(), "num_samples": 7}),
            "7 samples were packed when this was saved, and now 101 are",
        ),
    ],
    ids=["least", "too-few", "other"],
)
def test_what_cannot_be_had_is_an_error(make, message):
    with pytest.raises(DataError, match=message):
        make()


@pytest.mark.parametrize("order", ["random", "bucketed"])
@pytest.mark.parametrize("done", [0, 1, 4, 11, 12, 13])
def test_it_resumes_at_the_next_batch(done, order):
    lengths = torch.arange(101)
    whole, resumed = (
        PlannedLoader(lengths, plans(order=order, accumulation=2)[1]) for _ in range(2)
    )
    batches = whole.forever()
    for _ in range(done):
        next(batches)
    resumed.load_state_dict(whole.state_dict())
    again = resumed.forever()
    for _ in range(30):
        assert next(again).tolist() == next(batches).tolist()
        assert resumed.step_samples == whole.step_samples


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_no_sample_is_lost_when_the_number_of_ranks_changes(num_ranks):
    first = plans(2, order="random")
    planned = [list(itertools.islice(plan.epoch(plan.start()), 3)) for plan in first]
    seen = [index for rank in planned for batch in rank for index in batch.indices]
    state = planned[0][-1].after
    rest = [batches_of(p, p.adopt(state)) for p in plans(num_ranks, order="random")]
    counts = collections.Counter(seen + list(itertools.chain(*itertools.chain(*rest))))
    assert sorted(counts) == list(range(101))
    assert set(counts.values()) == {1}


def test_packing_is_logged_if_asked(caplog):
    caplog.set_level(logging.INFO)
    batches_of(plans(1, verbose=True)[0])
    assert "101 of 101 samples used" in caplog.text


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_the_rate_follows_the_samples(scaling, factor):
    assert lr_factor(32, 8, scaling) == factor


def scaled(scheduler_of=None):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = None if scheduler_of is None else scheduler_of(optimizer)
    return optimizer, VariableBatchLR(optimizer, scheduler, base_samples=8)


def rates(optimizer, schedule, sizes):
    found = []
    for size in sizes:
        schedule.begin(size)
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_constant_rates_are_scaled():
    assert rates(*scaled(), [8, 16, 4]) == [0.5, 1.0, 0.25]


def test_a_schedule_that_builds_on_its_last_rate_is_not_misled():
    found = rates(*scaled(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)), [16, 8, 4, 8])
    assert found == pytest.approx([1.0, 0.25, 0.0625, 0.0625])


def test_a_scaled_schedule_resumes():
    def exponential(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    first, second = scaled(exponential), scaled(exponential)
    rates(*first, [16, 8])
    second[1].load_state_dict(first[1].state_dict())
    assert rates(*second, [8, 16]) == rates(*first, [8, 16]) == pytest.approx([0.125, 0.125])
    assert first[1].get_last_lr() == [0.03125]


def test_the_state_of_a_plain_schedule_is_refused():
    with pytest.raises(DsError, match="without dynamic_batching"):
        scaled()[1].load_state_dict({"last_epoch": 3})


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([torch.tensor([1, 2]), [3]], [[1, 2], [3, 9]]),
        ([(torch.tensor([1, 2]), [1]), ([3], [4, 5])], ([[1, 2], [3, 9]], [[1, -1], [4, 5]])),
        (
            [{"input_ids": [1, 2], "labels": [1]}, {"input_ids": [3], "labels": [4, 5]}],
            {"input_ids": [[1, 2], [3, 9]], "labels": [[1, -1], [4, 5]]},
        ),
    ],
    ids=["tensors", "tuples", "mappings"],
)
def test_padding_makes_a_rectangle(samples, expected):
    found = pad_collate(9, -1)(samples)
    if isinstance(found, dict):
        assert {key: value.tolist() for key, value in found.items()} == expected
    elif isinstance(found, tuple):
        assert tuple(value.tolist() for value in found) == expected
    else:
        assert found.tolist() == expected
