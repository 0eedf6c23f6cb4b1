"""AsyncFile: every byte where it belongs, whatever the offset, length, dtype and address."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_core.errors import OpError
from ds_ops.aio import AsyncFile, AsyncIO, aligned_empty

_QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def random_bytes(size: int, shift: int, seed: int) -> torch.Tensor:
    """uint8 [size] at an address that is `shift` behind a page."""
    whole = aligned_empty(size + shift)
    generator = torch.Generator().manual_seed(seed)
    whole.copy_(torch.randint(256, (size + shift,), generator=generator, dtype=torch.uint8))
    return whole[shift:]


places = st.tuples(
    st.one_of(st.integers(0, 70_000), st.integers(0, 16).map(lambda page: page * 4096)),
    st.one_of(st.integers(0, 40_000), st.integers(0, 9).map(lambda page: page * 4096)),
    st.sampled_from([0, 1, 64, 511, 512]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=_QUIET)
@given(steps=st.lists(places, min_size=1, max_size=6), direct=st.booleans())
def test_file_holds_what_a_model_of_bytes_holds(engine, tmp_path, steps, direct):
    path, model = tmp_path / "file.bin", bytearray()
    path.unlink(missing_ok=True)
    with AsyncFile(path, "rw", engine=engine, direct=direct) as file:
        for seed, (offset, size, shift) in enumerate(steps):
            data = random_bytes(size, shift, seed)
            assert file.write_sync(data, offset) == size
            if size:
                model.extend(bytes(max(0, offset + size - len(model))))
                model[offset : offset + size] = bytes_of(data)
        assert file.size() == len(model)
        for offset, size, shift in steps:
            target = random_bytes(size, shift, 99)
            file.read_sync(target, offset)
            assert bytes_of(target) == model[offset : offset + size]
    assert path.read_bytes() == model


@pytest.mark.parametrize("align", [1, 4096], ids=["anywhere", "pages"])
def test_neighbours_written_at_the_same_time_do_no_harm(engine, tmp_path, align):
    chance = random.Random(7)
    cuts = sorted({chance.randrange(1, 1_500_000) // align * align for _ in range(150)} - {0})
    model = bytes_of(random_bytes(cuts[-1], 0, 1))
    runs = list(zip([0, *cuts], cuts, strict=False))
    chance.shuffle(runs)
    path = tmp_path / "file.bin"
    path.write_bytes(b"\xff" * (cuts[-1] + 77))
    with AsyncFile(path, "rw", engine=engine) as file:
        for begin, end in runs:  # the tensors live on in the tokens alone
            file.write(torch.frombuffer(bytearray(model[begin:end]), dtype=torch.uint8), begin)
        file.wait_all()
        into = [torch.zeros(end - begin, dtype=torch.uint8) for begin, end in runs]
        tokens = [file.read(t, begin) for t, (begin, _) in zip(into, runs, strict=True)]
        assert sum(token.wait() for token in tokens) == cuts[-1]
    for tensor, (begin, end) in zip(into, runs, strict=True):
        assert bytes_of(tensor) == model[begin:end]
    assert path.read_bytes() == model + b"\xff" * 77


def test_threads_share_a_file(engine, tmp_path):
    path = tmp_path / "file.bin"
    parts = [random_bytes(50_001, 0, seed) for seed in range(4)]
    failures: list[BaseException] = []

    def work(file: AsyncFile, number: int) -> None:
        try:
            for _ in range(10):
                file.write_sync(parts[number], number * 50_001)
                found = torch.empty_like(parts[number])
                file.read_sync(found, number * 50_001)
                assert torch.equal(found, parts[number])
        except BaseException as error:
            failures.append(error)

    with AsyncFile(path, "rw", engine=engine) as file:
        threads = [threading.Thread(target=work, args=(file, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert path.read_bytes() == b"".join(bytes_of(part) for part in parts)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_tensors_of_any_dtype(engine, tmp_path, dtype):
    tensor = torch.randn(3, 1001).to(dtype)
    with AsyncFile(tmp_path / "file.bin", "rw", engine=engine) as file:
        assert file.write_sync(tensor, 3) == tensor.nbytes
        found = torch.empty_like(tensor)
        file.read_sync(found, 3)
        scalar = torch.tensor(2.5)
        file.write_sync(scalar, 0)
        file.write_sync(torch.empty(0), 10**6)
    assert bytes_of(found) == bytes_of(tensor)
    assert file.path.endswith("file.bin")
    assert (tmp_path / "file.bin").stat().st_size == 3 + tensor.nbytes


def test_aligned_memory_is_not_copied(engine, tmp_path):
    tensor = aligned_empty((100, 4096), torch.uint8).fill_(3)
    with AsyncFile(tmp_path / "file.bin", "rw", engine=engine) as file:
        if not file.direct:
            pytest.skip(f"no direct transfers here: {file.why_buffered}")
        before = engine.counters()
        file.write_sync(tensor)
        file.read_sync(tensor)
        after = engine.counters()
        file.write_sync(tensor.view(-1)[1:], 1)
        last = engine.counters()
    assert after["bytes"] - before["bytes"] == 2 * tensor.nbytes
    assert after["bounced_bytes"] == before["bounced_bytes"]
    assert after["buffered_bytes"] == before["buffered_bytes"]
    assert last["buffered_bytes"] - after["buffered_bytes"] == 4095


def test_a_read_tells_autograd_that_the_tensor_changed(engine, tmp_path):
    with AsyncFile(tmp_path / "file.bin", "rw", engine=engine) as file:
        file.write_sync(torch.ones(8))
        values, weight = torch.zeros(8), torch.ones(8, requires_grad=True)
        loss = (values * weight).sum()
        file.read_sync(values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_preallocate_truncate_and_fsync(engine, tmp_path):
    with AsyncFile(tmp_path / "file.bin", "w", engine=engine) as file:
        file.preallocate(100_000)
        assert file.size() == 100_000
        file.write(torch.ones(1000, dtype=torch.uint8), 5)
        file.truncate(50_001)
        file.fsync()
        assert file.size() == 50_001
        file.preallocate(10)
        assert file.size() == 50_001
    found = (tmp_path / "file.bin").read_bytes()
    assert found == bytes(5) + b"\x01" * 1000 + bytes(49_000 - 4)


def test_modes_of_opening(engine, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"12345")
    with AsyncFile(path, "rw", engine=engine) as file:
        assert file.size() == 5
    with AsyncFile(path, "w", engine=engine) as file:
        assert file.size() == 0
    assert "closed" in repr(file)


def test_one_engine_bounds_what_its_files_have_in_flight(tmp_path):
    with AsyncIO("threads", block_bytes=4096, threads=3, queue_depth=3) as engine:
        files = [AsyncFile(tmp_path / f"{i}.bin", "rw", engine=engine) for i in range(5)]
        for file in files:
            file.write(torch.ones(200_000, dtype=torch.uint8))
        for file in files:
            file.close()
        counters = engine.counters()
    assert 1 <= counters["peak_in_flight"] <= 3
    assert counters["bytes"] == 1_000_000


def test_tokens_that_are_done_are_let_go(engine, tmp_path):
    with AsyncFile(tmp_path / "file.bin", "rw", engine=engine) as file:
        for _ in range(50):
            file.write(torch.ones(10)).wait()
        assert file.pending == 0


@pytest.mark.parametrize("name", ["io_uring", "threads"])
def test_closing_the_engine_beside_threads_that_use_it(name, tmp_path):
    for _ in range(20):
        made = AsyncIO(name, queue_depth=2, block_bytes=4096)
        files = [AsyncFile(tmp_path / f"{index}", "rw", engine=made) for index in range(3)]
        ends: list[str] = []

        def work(file: AsyncFile, ends: list[str] = ends) -> None:
            data = torch.ones(30_000, dtype=torch.uint8)
            try:
                while True:
                    assert file.write(data, 1).wait() == 30_000
            except OpError as error:
                ends.append(str(error))

        threads = [threading.Thread(target=work, args=(file,)) for file in files]
        for thread in threads:
            thread.start()
        made.close()
        for thread in threads:
            thread.join()
        assert len(ends) == 3
        assert all("it is closed" in end for end in ends)


def test_a_file_that_asks_for_large_blocks_goes_through_the_page_cache(tmp_path):
    path = tmp_path / "file.bin"
    data = random_bytes(3 << 20, 64, 1)
    with AsyncIO("threads", queue_depth=2, block_bytes=4096) as made:
        with AsyncFile(path, "rw", engine=made) as file:
            file._opened.alignment = 1 << 20  # more than the engine's aligned memory holds
            file.write_sync(data)
        assert made.counters()["bounced_bytes"] == 0
    assert path.read_bytes() == bytes_of(data)
