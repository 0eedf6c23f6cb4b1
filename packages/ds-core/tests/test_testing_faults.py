from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_core.errors import CommError
from ds_core.testing import (
    Died,
    die,
    die_on_call,
    fake_world,
    file_size_limit,
    flip_byte,
    poisoned_empty,
    truncate,
)
from ds_core.testing.faults import fail_open_files

Ranks = Callable[..., list[Any]]


def terminate_self() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die(signal.SIGTERM)


def replace_twice(folder: str) -> None:
    source, target = Path(folder, "a"), Path(folder, "b")
    with die_on_call(os, "replace", nth=2):
        for _ in range(2):
            source.write_text("new")
            os.replace(source, target)


def write_beyond_limit(path: str) -> None:
    with file_size_limit(100, on_limit="die"):
        Path(path).write_bytes(b"x" * 200)


def poisoned_sum() -> float:
    with poisoned_empty():
        return float(torch.empty(3).sum())


def test_die_ends_a_rank_even_if_the_signal_is_ignored(ranks: Ranks) -> None:
    assert ranks(1, terminate_self, deaths={0: signal.SIGTERM}) == [Died(signal.SIGTERM)]


def test_die_on_call_strikes_before_the_nth_call(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(1, replace_twice, str(tmp_path), deaths={0}) == [Died(signal.SIGKILL)]

    assert (tmp_path / "a").exists()
    assert (tmp_path / "b").exists()


def test_die_on_call_leaves_the_function_as_it_was() -> None:
    original = os.replace

    with die_on_call(os, "replace", nth=2):
        assert os.replace is not original

    assert os.replace is original


def test_file_size_limit_raises_at_the_limit_and_ends_with_the_block(tmp_path: Path) -> None:
    path = tmp_path / "data"

    with pytest.raises(OSError, match="File too large"), file_size_limit(100):
        path.write_bytes(b"x" * 200)
    size_at_failure = path.stat().st_size
    path.write_bytes(b"x" * 200)

    assert size_at_failure == 100
    assert path.stat().st_size == 200


def test_file_size_limit_can_crash_at_a_byte(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "data"

    assert ranks(1, write_beyond_limit, str(path), deaths={0}) == [Died(signal.SIGXFSZ)]

    assert path.stat().st_size == 100


@pytest.mark.parametrize(("num_bytes", "rest"), [(0, b"abcd"), (3, b"a"), (9, b"")])
def test_truncate_cuts_the_end(tmp_path: Path, num_bytes: int, rest: bytes) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abcd")

    truncate(path, num_bytes)

    assert path.read_bytes() == rest


@pytest.mark.parametrize(("offset", "damaged"), [(0, b"\x9ebc"), (-1, b"ab\x9c")])
def test_flip_byte_inverts_one_byte(tmp_path: Path, offset: int, damaged: bytes) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abc")

    flip_byte(path, offset)

    assert path.read_bytes() == damaged


def test_flip_byte_outside_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abc")

    with pytest.raises(ValueError, match="no byte at offset 3"):
        flip_byte(path, 3)


@pytest.mark.parametrize("on", ["read", "write"])
def test_open_files_that_fail_do_so_for_reads_or_writes_alone(tmp_path: Path, on: str) -> None:
    path, other = tmp_path / "state.swap", tmp_path / "other"
    with path.open("w+b", buffering=0) as file, other.open("w+b", buffering=0) as unharmed:
        file.write(b"abc")
        path.unlink()  # as a swap file has no name

        assert [name.split()[0] for name in fail_open_files(".swap", on=on)] == [str(path)]

        deeds = {
            "read": lambda each: os.pread(each.fileno(), 3, 0),
            "write": lambda each: os.pwrite(each.fileno(), b"abc", 0),
        }
        with pytest.raises(OSError, match="Bad file descriptor"):
            deeds.pop(on)(file)
        for done in (*(deed(file) for deed in deeds.values()), deeds.popitem()[1](unharmed)):
            assert done in (b"abc", b"", 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_poisoned_empty_is_nan_however_it_is_made(poison_empty: None, dtype: torch.dtype) -> None:
    like = torch.zeros(2, 3, dtype=dtype)

    made = [
        torch.empty(2, 3, dtype=dtype),
        torch.empty_like(like),
        torch.empty_strided((2, 3), (3, 1), dtype=dtype),
        like.new_empty(2, 3),
    ]

    assert all(tensor.isnan().all() for tensor in made)


def test_poisoned_empty_of_integers_is_their_largest_value() -> None:
    with poisoned_empty():
        numbers = torch.empty(2, dtype=torch.int16)
        flags = torch.empty(2, dtype=torch.bool)

    assert numbers.tolist() == [32767, 32767]
    assert flags.tolist() == [True, True]


def test_poisoned_empty_works_inside_ranks(ranks: Ranks) -> None:
    (total,) = ranks(1, poisoned_sum)

    assert total != total


def test_fake_world_has_the_shape_of_the_real_one() -> None:
    with fake_world(4096, rank=17):
        dist.all_reduce(torch.ones(2))
        mesh = dist.init_device_mesh("cpu", (512, 8), mesh_dim_names=("dp", "tp"))
        seen = (dist.get_rank(), dist.get_world_size(), mesh["tp"].get_local_rank())

    assert seen == (17, 4096, 1)
    assert not dist.is_initialized()


def test_fake_world_ends_after_an_error() -> None:
    with pytest.raises(KeyError), fake_world(8):
        raise KeyError

    with fake_world(16):
        assert dist.get_world_size() == 16


def test_fake_worlds_do_not_nest() -> None:
    with fake_world(8, rank=3), pytest.raises(CommError, match="already rank 3 of 8"):  # noqa: SIM117
        with fake_world(4):
            pass


@pytest.mark.parametrize("rank", [-1, 4])
def test_fake_rank_outside_its_world_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank: got {rank}, expected 0 to 3"), fake_world(4, rank):
        pass
