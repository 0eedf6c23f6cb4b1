"""The steps of optimizers in Triton, bit for bit, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CHECKS = (
    "steps_are_the_references",
    "random_bits_are_the_references",
    "keys_count_on",
    "parts_are_cut_right",
    "a_flag_leaves_everything_as_it_is",
    "undo_restores_every_bit",
    "nothing_beyond_the_end_is_touched",
    "eight_bit_codes_are_the_references",
    "eight_bits_keep_bad_gradients_in_their_block",
    "lamb_is_the_same_in_parts",
    "lambs_direction_is_zero_where_nothing_happened",
    "more_states_than_two_are_refused",
)


@pytest.fixture(scope="module")
def found():
    probe = str(Path(__file__).with_name("optimizer_probe.py"))
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, probe], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_it_holds(found, check):
    assert not found[check], found[check]


def test_every_check_is_asked_for(found):
    assert set(found) == set(CHECKS)
