"""Which micro-batch ends a step."""

from __future__ import annotations

import pytest

from ds_core.accumulation import Accumulation, Held
from ds_core.errors import DsError


def test_the_last_of_so_many_ends_a_step():
    accumulation = Accumulation(3)
    seen = []
    for _ in range(6):
        seen.append((accumulation.begin(), accumulation.is_boundary, accumulation.advance()))
    assert seen == [(True, False, False), (False, False, False), (False, True, True)] * 2


def test_unmanaged_each_step_is_the_end():
    accumulation = Accumulation(3, managed=False)
    assert accumulation.begin()
    assert not accumulation.begin()
    assert not accumulation.is_boundary
    assert accumulation.advance()
    assert accumulation.is_between_steps
    with pytest.raises(DsError, match=r"every engine\.step\(\) ends a step"):
        accumulation.say(True)


def test_the_callers_word_counts_until_taken_back():
    accumulation = Accumulation(1)
    accumulation.say(False)
    assert [accumulation.advance() for _ in range(3)] == [False] * 3
    accumulation.say(True)
    assert accumulation.advance()
    accumulation.say(None)
    assert accumulation.advance()


def test_a_step_that_was_put_off_ends_once_counting_goes_on():
    accumulation = Accumulation(2)
    accumulation.say(False)
    assert [accumulation.advance() for _ in range(5)] == [False] * 5
    accumulation.say(None)
    assert [accumulation.advance() for _ in range(3)] == [True, False, True]


@pytest.mark.parametrize(("samples", "steps"), [(8, 1), (24, 3)])
def test_a_batch_is_cut_into_micro_batches(samples, steps):
    accumulation = Accumulation(2)
    accumulation.resize("set_train_batch_size", samples, 8)
    assert accumulation.steps == steps


@pytest.mark.parametrize("samples", [0, -8, 12])
def test_a_batch_that_does_not_divide_is_refused(samples):
    with pytest.raises(DsError, match=f"got {samples}, expected a positive multiple of 8"):
        Accumulation(2).resize("set_train_batch_size", samples, 8)


def test_a_step_that_has_begun_keeps_its_size():
    accumulation = Accumulation(2)
    accumulation.begin()
    accumulation.advance()
    with pytest.raises(DsError, match="1 micro-batches of the present step are done"):
        accumulation.resize("set_train_batch_size", 8, 8)


def test_only_the_outermost_block_releases():
    accumulation, released = Accumulation(1), []
    with Held(accumulation, lambda: released.append(1)):
        with Held(accumulation, lambda: released.append(2)):
            assert accumulation.held
        assert accumulation.held
    assert released == [1]
    assert not accumulation.held


def test_an_error_releases_nothing():
    accumulation, released = Accumulation(1), []
    with pytest.raises(KeyError), Held(accumulation, lambda: released.append(1)):
        raise KeyError
    assert released == []
    assert not accumulation.held
