"""Schedules of difficulty: values, multiples, ends, and what cannot be."""

from __future__ import annotations

import pytest

from ds_core.data import FixedDiscrete, FixedLinear, FixedRoot
from ds_core.data.schedule import load_function
from ds_core.errors import ConfigError, DsError


def test_a_line_rises_in_multiples_and_ends_at_the_maximum():
    schedule = FixedLinear(8, 60, 10, 8)
    assert [schedule(step) for step in (0, 1, 5, 9, 10, 99)] == [8, 8, 32, 48, 60, 60]


def test_a_root_rises_fast_at_first():
    root, line = FixedRoot(10, 110, 100, degree=2), FixedLinear(10, 110, 100)
    assert (root(25), line(25)) == (60, 35)
    assert (root(100), line(100)) == (110, 110)
    assert all(root(step) >= line(step) for step in range(101))


def test_the_first_value_is_a_multiple_no_smaller_than_the_minimum():
    assert FixedLinear(9, 64, 100, 8)(1) == 16


def test_given_values_hold_up_to_their_last_steps():
    schedule = FixedDiscrete((1, 2, 5), (3, 6))
    assert [schedule(step) for step in range(1, 9)] == [1, 1, 1, 2, 2, 2, 5, 5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedLinear(8, 4, 10), "the maximum 4 is below the minimum 8"),
        (lambda: FixedLinear(8, 16, 0), "total_steps is 0, expected more than 0"),
        (lambda: FixedDiscrete((1, 2), (1, 2)), "2 values and 2 last steps"),
        (lambda: FixedDiscrete((1, 2, 3), (2, 1)), "must ascend"),
    ],
    ids=["backwards", "no-steps", "too-few", "order"],
)
def test_what_cannot_be_is_an_error(make, message):
    with pytest.raises(DsError, match=message):
        make()


def test_a_function_is_found_by_its_path():
    assert load_function("math:isqrt", "key")(17) == 4


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("math.isqrt", r'key: got "math.isqrt", expected "package.module:function"'),
        ("no_such_module:f", "cannot be imported: No module named"),
        ("math:nothing", "has no attribute 'nothing'"),
        ("math:pi", "is a float, no function"),
    ],
)
def test_a_function_that_is_not_there_is_an_error(path, message):
    with pytest.raises(ConfigError, match=message):
        load_function(path, "key")
