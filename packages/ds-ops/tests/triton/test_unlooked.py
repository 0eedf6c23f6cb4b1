"""Lists of numbers that lie on a GPU are not looked at: what serving kernels do with wrong ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module")
def seen():
    probe = str(Path(__file__).with_name("unlooked_probe.py"))
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, probe], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("what", "rows"),
    [
        ("right", [False, False, False, False]),
        ("a block behind the cache", [True, True, True, False]),
        ("a block before the cache", [False, False, False, True]),
        ("more keys than the table has blocks for", [False, False, False, True]),
        ("fewer keys than queries", [True, False, False, False]),
    ],
)
def test_queries_that_lack_keys_become_nan_and_no_others(seen, what, rows):
    assert seen[what] == rows


@pytest.mark.parametrize(
    ("what", "lost", "skipped"),
    [
        ("a position without a row", 1, None),
        ("a slot behind the cache", None, 2),
        ("a slot before the cache", None, 3),
    ],
)
def test_a_wrong_position_makes_nan_and_a_wrong_slot_is_skipped(seen, what, lost, skipped):
    rows, slots = seen[what]
    assert rows == [token == lost for token in range(4)]
    assert slots == [slot < 4 and slot != skipped for slot in range(len(slots))]
