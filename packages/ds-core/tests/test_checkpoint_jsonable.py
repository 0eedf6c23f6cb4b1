from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from ds_core.checkpoint.jsonable import decode, encode
from ds_core.errors import CheckpointError


def through_json(value):
    return decode(json.loads(json.dumps(encode(value, "x"), allow_nan=False)))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        7,
        10**30,
        0.1 + 0.2,
        float("inf"),
        "ünicode\n",
        [],
        {},
        {"a": [1, {"b": None}]},
        {30: 1, 60: 2},
        {1: "int", "1": "str"},
        {"$float": "mine"},
        {"$pairs": [[1, 2]], "other": 0},
        {None: 1, 2.5: {3: [4]}},
    ],
    ids=repr,
)
def test_values_come_back_as_they_were(value):
    back = through_json(value)
    assert back == value
    assert type(back) is type(value)


def test_nan_comes_back():
    assert math.isnan(through_json([float("nan")])[0])


def test_tuples_become_lists_and_subclasses_become_plain():
    back = through_json({"betas": (0.9, 0.95), "milestones": Counter({30: 1}), "n": np.float64(2)})
    assert back == {"betas": [0.9, 0.95], "milestones": {30: 1}, "n": 2.0}
    assert type(back["milestones"]) is dict


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param({"a": [0, {1, 2}]}, r"cannot save x\.a\[1\]: .* builtins\.set", id="set"),
        pytest.param(b"bytes", r"cannot save x: .* builtins\.bytes", id="bytes"),
        pytest.param(np.int64(3), r"numpy\.int64", id="numpy-integer"),
        pytest.param(torch.float32, r"torch\.dtype", id="dtype"),
        pytest.param({(1, 2): 3}, r"key of type tuple \(\(1, 2\)\)", id="tuple-key"),
        pytest.param(lambda: 0, "function", id="function"),
    ],
)
def test_anything_else_is_refused_by_name_and_type(value, message):
    with pytest.raises(CheckpointError, match=message):
        encode(value, "x")
