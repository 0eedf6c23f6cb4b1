"""Floors do the work that they stand for, and nothing beyond it."""

from __future__ import annotations

import pytest
import torch

from ds_core.errors import OpError
from ds_ops.bench import floors
from ds_ops.native import library


@pytest.fixture(autouse=True)
def built():
    reason = library.unavailable()
    if reason is not None:
        pytest.skip(reason)


WALKS = [(step, past) for step in (64, 512, 4096) for past in (False, True)]


@pytest.mark.parametrize(("step", "past"), WALKS)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_line_is_read_once(step, past, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = (torch.randint(0, 2**31, (n,), dtype=torch.int32) for n in (100_003, 4096))
        found = floors._walk([a, b], 2, step, past)()
    finally:
        torch.set_num_threads(before)
    read = [t[: t.nbytes // 64 * 16] for t in (a, b)]
    assert found == sum(int(t.to(torch.int64).sum()) for t in read) % 2**32


@pytest.mark.parametrize(("step", "past"), WALKS)
def test_every_line_is_written_and_nothing_beside(step, past):
    source = torch.ones(200_000, dtype=torch.int32)
    room = torch.zeros(100_000 + 32, dtype=torch.int32)
    target = room[16:-16]
    floors._walk([source, target], 1, step, past)()
    written = target[: target.nbytes // 64 * 16]
    assert (room[:16] == 0).all()
    assert (room[-16:] == 0).all()
    assert (written != 0).all()


def test_a_stream_may_be_read_and_written_in_place():
    t = torch.ones(4096, dtype=torch.int32)
    floors.stream_floor([t, t.clone()], [t])()
    assert (t != 1).any()


def test_nothing_to_read_is_no_work():
    assert floors.read_floor(torch.empty(0))() == 0


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        ([torch.ones(4, 4).t()[1:]], "expected contiguous ones on the CPU"),
        ([torch.ones(64)] * 17, "got 17 and 0 tensors, expected at most 16"),
    ],
    ids=["strided", "many"],
)
def test_what_cannot_be_streamed_is_refused(reads, message):
    with pytest.raises(OpError, match=message):
        floors.stream_floor(reads, [])


def test_the_peak_of_arithmetic_is_positive():
    assert floors.peak_flops(seconds=0.01) > 1e8
