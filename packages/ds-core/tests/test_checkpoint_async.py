from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

import ds_core
from ds_core import comm
from ds_core.checkpoint import (
    AsyncSaver,
    FlatShard,
    full_state_dict,
    latest,
    load,
    save,
    storage,
    verify,
)
from ds_core.checkpoint.snapshot import HostBuffers
from ds_core.comm.process_groups import timeout_of
from ds_core.errors import CheckpointError
from ds_core.testing import Raised, run_ranks


def state(fill: float):
    return {"w": torch.full((100,), fill), "v": torch.full((3, 3), fill), "fill": fill}


def loaded(directory, tag=None):
    return load(directory, tag, state=state(0.0))


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


@pytest.fixture
def gate(monkeypatch):
    """Keeps data files from being written until it is opened."""
    opened = threading.Event()
    write = storage.write_data_file

    def wait_and_write(*args, **kwargs):
        assert opened.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(storage, "write_data_file", wait_and_write)
    yield opened
    opened.set()


def test_what_is_saved_is_the_state_at_the_call(tmp_path, gate):
    live = state(1.0)
    live["client"] = {"seen": [1]}
    with AsyncSaver() as saver:
        pending = saver.save(tmp_path, "a", live)
        live["w"].zero_()
        live["v"].add_(1)
        live["client"]["seen"].append(2)
        assert not pending.done()
        with pytest.raises(CheckpointError, match="it holds no complete checkpoint"):
            latest(tmp_path)
        gate.set()
        assert pending.wait() == tmp_path / "a"
    assert torch.equal(loaded(tmp_path)["w"], torch.ones(100))
    assert torch.equal(loaded(tmp_path)["v"], torch.ones(3, 3))
    assert loaded(tmp_path)["client"] == {"seen": [1]}
    verify(tmp_path)
    assert pending.figures.copied_bytes == 109 * 4
    assert pending.figures.write_s > 0


def test_next_save_waits_for_the_one_in_flight(tmp_path, gate):
    with AsyncSaver() as saver:
        first = saver.save(tmp_path, "a", state(1.0))
        second = []
        caller = threading.Thread(
            target=lambda: second.append(saver.save(tmp_path, "b", state(2.0)))
        )
        caller.start()
        caller.join(0.3)
        assert caller.is_alive()  # back-pressure: it has not copied a second state
        assert not first.done()
        gate.set()
        caller.join(60)
        assert first.done()
        second[0].wait()
    assert loaded(tmp_path)["fill"] == 2.0
    assert loaded(tmp_path, "a")["fill"] == 1.0


def test_buffers_are_used_again(tmp_path):
    with AsyncSaver() as saver:
        saver.save(tmp_path, "a", state(1.0)).wait()
        chunk = saver._buffers._chunks[0]
        saver.save(tmp_path, "b", state(2.0)).wait()
        assert saver._buffers._chunks[0] is chunk
        assert saver._buffers.nbytes == chunk.nbytes < 109 * 4 + 2 * 64


def test_buffers_hold_many_chunks_and_shrink(monkeypatch):
    monkeypatch.setattr("ds_core.checkpoint.snapshot._CHUNK_BYTES", 1024)
    buffers = HostBuffers(pinned=False)
    pieces = buffers.lay_out([1000, 100, 5000, 0, 64])
    for i, piece in enumerate(pieces):
        piece.fill_(i)
    assert [piece.numel() for piece in pieces] == [1000, 100, 5000, 0, 64]
    assert [set(piece.tolist()) for piece in pieces] == [{0}, {1}, {2}, set(), {4}]
    buffers.lay_out([10])
    assert buffers.nbytes <= 1024


def test_state_of_another_form_is_planned_again(tmp_path):
    with AsyncSaver() as saver:
        saver.save(tmp_path, "a", state(1.0)).wait()
        more = {**state(2.0), "extra": torch.arange(5), "late": "x"}
        saver.save(tmp_path, "b", more).wait()
        saver.save(tmp_path, "c", {"w": torch.ones(7)}).wait()
    into = {**state(0.0), "extra": torch.zeros(5, dtype=torch.int64), "late": ""}
    assert load(tmp_path, "b", state=into)["extra"].tolist() == [0, 1, 2, 3, 4]
    assert load(tmp_path, "b", state=into)["late"] == "x"
    assert load(tmp_path, "c", state={"w": torch.zeros(7)})["w"].sum() == 7


def test_error_of_the_thread_is_raised_once_by_whoever_asks_first(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for ask in ("save", "wait", "close"):
        saver = AsyncSaver()
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_data_file", full)
            pending = saver.save(tmp_path, "a", state(1.0))
            while not pending.done():
                time.sleep(0.01)
        asked = {
            "save": lambda s=saver: s.save(tmp_path, "b", state(2.0)),
            "wait": saver.wait,
            "close": saver.close,
        }
        with pytest.raises(CheckpointError, match="No space left on device"):
            asked[ask]()
        assert "No space left on device" in caplog.text  # also if nobody ever asks
        saver.close()
        assert not list(tmp_path.glob("a*"))


def test_saver_goes_on_after_an_error(tmp_path, monkeypatch):
    with AsyncSaver() as saver:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_data_file", lambda *_, **__: 1 / 0)
            pending = saver.save(tmp_path, "a", state(1.0))
            with pytest.raises(CheckpointError, match="ZeroDivisionError"):
                pending.wait()
        saver.save(tmp_path, "b", state(2.0))
    assert loaded(tmp_path)["fill"] == 2.0


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda s, d: s.save(d, "a", {"w": object()}), "cannot save w"),
        (lambda s, d: s.save(d, "a/b", {"w": torch.ones(1)}), "expected the name of a directory"),
        (lambda s, d: s.save(d, "a", {"w": torch.ones(1)}, keep_last=0), "keep_last: got 0"),
        (lambda s, d: s.save(d, "a", {"w": torch.ones(1, dtype=torch.complex128)}), "has no"),
    ],
    ids=["value", "tag", "keep_last", "dtype"],
)
def test_what_cannot_be_saved_is_refused_at_the_call(tmp_path, bad, match):
    with AsyncSaver() as saver, pytest.raises(CheckpointError, match=match):
        bad(saver, tmp_path)
    assert not list(tmp_path.iterdir())


def test_closed_saver_and_bad_timeout_are_refused(tmp_path):
    saver = AsyncSaver()
    saver.close()
    with pytest.raises(CheckpointError, match="this AsyncSaver is closed"):
        saver.save(tmp_path, "a", state(1.0))
    with pytest.raises(CheckpointError, match="timeout_s: got 0"):
        AsyncSaver(timeout_s=0)


def test_wait_that_is_too_short_says_that_the_save_goes_on(tmp_path, gate):
    with AsyncSaver() as saver:
        pending = saver.save(tmp_path, "a", state(1.0))
        with pytest.raises(CheckpointError, match=r"has not ended within 0.01 s; it goes on"):
            pending.wait(0.01)
        gate.set()
    assert latest(tmp_path) == "a"


EXITING = """
import sys, time, torch
from ds_core.checkpoint import AsyncSaver, storage
write = storage.write_data_file
def slowly(*args, **kwargs):
    time.sleep(1.0)
    {fault}
    return write(*args, **kwargs)
storage.write_data_file = slowly
AsyncSaver().save(sys.argv[1], "a", {{"w": torch.ones(10)}})
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"], ids=["end", "exit", "error"])
def test_program_that_ends_waits_for_the_save(tmp_path, end):
    script = EXITING.format(fault="", end=end)
    subprocess.run([sys.executable, "-c", script, tmp_path], timeout=120, capture_output=True)
    assert load(tmp_path, state={"w": torch.zeros(10)})["w"].sum() == 10


def test_error_that_nobody_asks_for_is_on_the_console(tmp_path):
    script = EXITING.format(fault="1 / 0", end="")
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], timeout=120, capture_output=True, text=True
    )
    assert "saving checkpoint 'a'" in done.stderr
    assert "ZeroDivisionError" in done.stderr


class Shelf:
    """Stands for a disk: shards are read from it and written to it one at a time."""

    def __init__(self, contents: dict[str, torch.Tensor]) -> None:
        self.contents = contents
        self.buffer = torch.empty(max(each.numel() for each in contents.values()))
        self.reads: list[str] = []
        self.threads: set[int] = set()

    def shard(self, name, shape, start, *, writable=True):
        def read():
            self.reads.append(name)
            self.threads.add(threading.get_ident())
            part = self.buffer[: self.contents[name].numel()]  # one buffer for all shards
            return part.copy_(self.contents[name])

        def write(local):
            self.contents[name] = local

        numel = self.contents[name].numel()
        return FlatShard.lazy(
            numel, torch.float32, shape, start, read=read, write=write if writable else None
        )


def halves(contents, shape, start):
    shelf = Shelf(contents)
    return shelf, {"m": {name: shelf.shard(name, shape, start) for name in contents}}


@pytest.mark.parametrize("way", ["sync", "async"])
def test_lazy_shards_are_read_and_filled_one_at_a_time(tmp_path, way):
    numel = 5 * 7 * 3
    whole = {name: torch.randn(5, 7, 3) for name in "abc"}
    parts = {name: value.reshape(-1).clone() for name, value in whole.items()}
    shelf, lazies = halves(parts, (5, 7, 3), 0)
    if way == "sync":
        save(tmp_path, "a", lazies)
    else:
        with AsyncSaver() as saver:
            saver.save(tmp_path, "a", lazies)
            saver.wait_for_reads()
            assert shelf.reads == ["a", "b", "c"]
            assert threading.get_ident() not in shelf.threads
            assert saver._buffers.nbytes == 0
    assert shelf.reads == ["a", "b", "c"]
    into = {"m": {name: torch.zeros(5, 7, 3) for name in whole}}
    load(tmp_path, state=into)
    assert all(torch.equal(into["m"][name], whole[name]) for name in whole)
    middle, targets = halves({name: torch.zeros(60) for name in whole}, (5, 7, 3), 10)
    load(tmp_path, state=targets)
    for name in whole:
        assert torch.equal(middle.contents[name], parts[name][10:70])
    assert middle.reads == []  # what is overwritten as a whole is not read first
    assert numel == 105


def test_lazy_pieces_of_a_shard_are_read_once(tmp_path):
    shelf = Shelf({"a": torch.arange(20.0)})  # three boxes of a matrix of rows of 8
    shard = shelf.shard("a", (4, 8), 6)
    assert len(shard.pieces) == 3
    rest = {
        "b": FlatShard(torch.zeros(0), (4, 8)),
    }
    with pytest.raises(CheckpointError, match="add up to 20 of its 32"):
        save(tmp_path, "a", {"a": shard, **rest})
    assert shelf.reads == ["a"]


def test_lazy_shard_that_can_only_be_saved_and_wrong_reads_are_refused(tmp_path):
    shelf = Shelf({"a": torch.ones(4)})
    only = shelf.shard("a", (4,), 0, writable=False)
    save(tmp_path, "a", {"a": only})
    with pytest.raises(CheckpointError, match="can be saved only"):
        load(tmp_path, state={"a": only})
    with pytest.raises(CheckpointError, match=r"is not in memory: it is read and written within"):
        _ = only.local
    with pytest.raises(CheckpointError, match="is not in memory"):
        only.clone()
    wrong = FlatShard.lazy(4, torch.float32, (4,), read=lambda: torch.ones(3))
    with pytest.raises(CheckpointError, match=r"its `read` returned torch.float32 \[3\]"):
        save(tmp_path, "b", {"a": wrong})
    assert latest(tmp_path) == "a"


def test_failed_read_of_a_lazy_shard_lets_the_update_go_on(tmp_path):
    def broken():
        raise OSError("the disk is gone")

    lazy = FlatShard.lazy(4, torch.float32, (4,), read=broken)
    with AsyncSaver() as saver:
        saver.save(tmp_path, "a", {"a": lazy})
        saver.wait_for_reads()
        with pytest.raises(CheckpointError, match="the disk is gone"):
            saver.wait()


def test_lazy_shard_opens_for_a_block(tmp_path):
    shelf = Shelf({"a": torch.ones(4)})
    shard = shelf.shard("a", (2, 4), 0)
    with shard.opened() as local:
        assert local.tolist() == [1, 1, 1, 1]
    with shard.opened(fill=True) as local:
        local.fill_(7)
    assert shelf.contents["a"].tolist() == [7, 7, 7, 7]
    with pytest.raises(ZeroDivisionError), shard.opened(fill=True) as local:
        local.div_(1 // 0)
    assert shelf.contents["a"].tolist() == [7, 7, 7, 7]


# ---------------------------------------------------------------------- several ranks


def save_shards_twice(directory: str):
    rank = dist.get_rank()
    flat = torch.arange(24.0)
    local = flat[rank * 12 : rank * 12 + 12].clone()
    both = {"w": FlatShard(local, (4, 6), rank * 12), "same": torch.ones(9), f"mine{rank}": rank}
    with AsyncSaver() as saver:
        saver.save(directory, "a", both)
        for _ in range(20):  # training's collectives go on meanwhile
            dist.all_reduce(torch.ones(1000))
        local.add_(100)
        pending = saver.save(directory, "b", both)
        copied = pending.figures.copied_bytes
        local.zero_()
    saver.close()  # may be called again
    return copied


def test_ranks_save_their_shards_and_what_they_share_once(tmp_path):
    copied = run_ranks(2, save_shards_twice, str(tmp_path))
    assert sum(copied) == (24 + 9) * 4  # of what both hold, one copies nothing
    for tag, plus in (("a", 0.0), ("b", 100.0)):
        into = {"w": torch.zeros(4, 6), "same": torch.zeros(9), "mine0": None, "mine1": None}
        got = load(tmp_path, tag, state=into)
        assert torch.equal(got["w"].reshape(-1), torch.arange(24.0) + plus)
        assert (got["mine0"], got["mine1"]) == (0, 1)
        verify(tmp_path, tag)


def save_from_pairs(directory: str) -> float:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    mine = pairs[rank // 2]
    for fill in (1.0, 2.0):  # a second saver of the same ranks
        with AsyncSaver(mine) as saver:
            share = FlatShard(torch.full((5,), fill + rank), (10,), rank % 2 * 5)
            saver.save(f"{directory}/pair{rank // 2}", "a", {"w": share})
    got = load(f"{directory}/pair{rank // 2}", state={"w": torch.zeros(10)}, group=mine)
    return float(got["w"].sum())


def test_groups_of_ranks_save_by_themselves(tmp_path):
    sums = run_ranks(4, save_from_pairs, str(tmp_path))
    assert sums == [25.0, 25.0, 45.0, 45.0]


def fail_on_one_rank(directory: str, where: str):
    rank = dist.get_rank()
    saver, write = AsyncSaver(), storage.write_data_file
    texts = []
    for tag in ("a", "b"):
        content = {"w": FlatShard(torch.ones(5), (10,), rank * 5)}
        if rank == 1 and tag == "b" and where == "state":
            content["hook"] = object()
        if rank == 1 and tag == "b" and where == "write":
            storage.write_data_file = None
        name = f"{tag}{rank}" if where == "tag" and tag == "b" else tag
        try:
            saver.save(directory, name, content)
            saver.wait()
        except CheckpointError as error:
            texts.append(str(error))
        storage.write_data_file = write
    saver.close()
    return texts


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ("state", "cannot save hook"),
        ("write", "failed on rank 1: cannot write"),
        ("tag", "ranks disagree on the tag"),
    ],
)
def test_failure_of_one_rank_is_raised_on_all(tmp_path, where, match):
    for texts in run_ranks(2, fail_on_one_rank, str(tmp_path), where):
        assert len(texts) == 1
        assert match in texts[0]
    assert latest(tmp_path) == "a"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "latest"]


def save_until_killed(directory: str, rank_to_kill: int, delay_s: float, how: int) -> None:
    saver = AsyncSaver(timeout_s=6)
    fill = 0.0
    while True:
        fill += 1.0
        content = {"w": torch.full((500_000,), fill), "fill": fill}
        saver.save(directory, f"t{int(fill) % 2}", content)
        if dist.get_rank() == rank_to_kill and fill == 3.0:
            threading.Timer(delay_s, lambda: os.kill(os.getpid(), how)).start()


@pytest.mark.parametrize(("rank", "delay_s"), [(0, 0.003), (0, 0.017), (1, 0.009)])
def test_rank_killed_in_a_save_neither_hangs_nor_harms(tmp_path, rank, delay_s):
    outcomes = run_ranks(
        2,
        save_until_killed,
        str(tmp_path),
        rank,
        delay_s,
        signal.SIGKILL,
        deaths={rank: signal.SIGKILL},
    )
    survivor = outcomes[1 - rank]
    assert isinstance(survivor, Raised)
    assert "CheckpointError" in survivor.type
    assert f"rank {rank} stopped answering" in survivor.message
    verify(tmp_path)
    got = load(tmp_path, state={"w": torch.zeros(500_000)})
    assert got["fill"] >= 2.0
    assert torch.all(got["w"] == got["fill"])


# ---------------------------------------------------------------------- the engine


def make_engine(more=None, **checkpoint):
    torch.manual_seed(0)
    config = {
        **(more or {}),
        "train_batch_size": 2,
        "progress": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "checkpoint": checkpoint,
    }
    return ds_core.initialize(torch.nn.Linear(4, 1), config)


def train(engine, steps):
    losses = []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(engine.global_step)
        loss = engine(torch.randn(2, 4, generator=generator)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("key", ["asynchronous", "writer"])
def test_engine_trains_on_and_resumes_where_it_saved(tmp_path, key):
    section = {"asynchronous": True} if key == "asynchronous" else {"writer": {"decoupled": True}}
    engine = make_engine(**section)
    train(engine, 3)
    path = engine.save_checkpoint(tmp_path, client_state={"epoch": 1})
    expected = train(engine, 4)
    assert engine.wait_for_checkpoint() == path == str(tmp_path / "step3")
    assert engine.wait_for_checkpoint() is None
    engine.close()
    other = make_engine()
    assert other.load_checkpoint(tmp_path, verify=True) == {"epoch": 1}
    assert other.global_step == 3
    assert train(other, 4) == expected
    other.close()


def test_argument_of_the_call_beats_the_configuration(tmp_path, gate):
    engine = make_engine(asynchronous=True)
    gate.set()
    engine.save_checkpoint(tmp_path, "now", asynchronous=False)
    assert latest(tmp_path) == "now"
    gate.clear()
    engine.save_checkpoint(tmp_path, "later")
    assert latest(tmp_path) == "now"
    gate.set()
    engine.close()
    assert latest(tmp_path) == "later"


def test_engine_tells_of_a_failed_save_at_the_next_and_closes_all_the_same(tmp_path, monkeypatch):
    engine = make_engine(asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_data_file", lambda *_, **__: 1 / 0)
        engine.save_checkpoint(tmp_path, "a")
        with pytest.raises(CheckpointError, match="ZeroDivisionError"):
            engine.save_checkpoint(tmp_path, "b")
        engine.save_checkpoint(tmp_path, "c")
        with pytest.raises(CheckpointError, match="ZeroDivisionError"):
            engine.close()
    assert engine.sharding is not None
    assert not list(tmp_path.glob("[abc]*"))


def test_load_waits_for_the_save_in_flight(tmp_path):
    engine = make_engine(asynchronous=True)
    train(engine, 1)
    engine.save_checkpoint(tmp_path)
    train(engine, 1)
    engine.load_checkpoint(tmp_path)
    assert engine.global_step == 1
    engine.close()


def values_of(engine):
    return {name: value.clone() for name, value in engine.state_dict().items()}


@pytest.mark.parametrize("how", ["load_state_dict", "load_pretrained", "before_change"])
def test_what_overwrites_parameters_waits_for_a_save_that_reads_them(
    tmp_path, gate, monkeypatch, how
):
    engine = make_engine()
    train(engine, 1)
    sharding, before = engine.sharding, values_of(engine)
    zeros = {name: torch.zeros_like(value) for name, value in before.items()}
    safetensors.torch.save_file(zeros, tmp_path / "model.safetensors")

    def lazy():
        """As of parameters that are not in memory: read when they are written."""
        held = {name: p.detach().view(-1) for name, p in engine.module.named_parameters()}
        return {
            name: FlatShard.lazy(
                p.numel(), p.dtype, tuple(before[name].shape), 0, read=p.clone, write=p.copy_
            )
            for name, p in held.items()
        }

    overwrite = {
        "load_state_dict": lambda: engine.load_state_dict(zeros),
        "load_pretrained": lambda: engine.load_pretrained(tmp_path / "model.safetensors"),
        "before_change": lambda: (sharding.before_change(), engine.load_state_dict(zeros)),
    }[how]
    monkeypatch.setattr(sharding, "model_state", lazy)
    engine.save_checkpoint(tmp_path, "a", asynchronous=True)
    writer = threading.Thread(target=overwrite)
    writer.start()
    writer.join(0.3)
    assert writer.is_alive()
    assert all(torch.equal(before[name], value) for name, value in values_of(engine).items())
    gate.set()
    writer.join(60)
    engine.wait_for_checkpoint()
    saved = full_state_dict(tmp_path, "a")
    assert all(torch.equal(before[name], saved[name]) for name in before)
    assert not any(bool(value.any()) for value in values_of(engine).values())
    engine.close()


def a_savers_patience() -> list[float]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=77))
    some = dist.new_group([0, 1], timeout=timedelta(seconds=55))
    savers = [AsyncSaver(), AsyncSaver(some), AsyncSaver(timeout_s=44)]
    engine = make_engine({"comm": {"timeout_s": 33}})  # of all its ranks' group from now on
    savers.append(AsyncSaver())
    found = [timeout_of(saver._own_group).total_seconds() for saver in savers]
    for saver in savers:
        saver.close()
    engine.close()
    return found


def test_ranks_wait_as_long_as_in_the_group_that_saves():
    assert run_ranks(2, a_savers_patience, initialized=False) == [[77, 55, 44, 33]] * 2


def save_while_a_rank_stops(directory: str) -> str | None:
    engine = make_engine({"comm": {"timeout_s": 5}})
    others = [None, None]
    dist.all_gather_object(others, os.getpid())
    if dist.get_rank() == 1:
        # In the thread that writes; the process is killed in the end.
        storage.write_data_file = lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP)
    engine.save_checkpoint(directory, "a", asynchronous=True)
    if dist.get_rank() == 1:
        time.sleep(60)
    try:
        engine.wait_for_checkpoint()
    except CheckpointError as error:
        return str(error)
    finally:
        os.kill(others[1], signal.SIGKILL)
    return None


def test_a_rank_that_is_stopped_in_a_save_holds_others_no_longer_than_comm_says(tmp_path):
    outcomes = run_ranks(2, save_while_a_rank_stops, str(tmp_path), deaths={1: signal.SIGKILL})
    assert "saving checkpoint 'a'" in str(outcomes[0])
    assert not (tmp_path / "a").exists()


def test_statistics_are_logged_on_demand(tmp_path, caplog):
    caplog.set_level("INFO")
    engine = make_engine(writer={"decoupled": True, "show_statistics": True})
    engine.save_checkpoint(tmp_path)
    engine.close()
    assert "rank 0 copied" in caplog.text


@pytest.mark.parametrize(
    ("writer", "match"),
    [({"type": "MOCK"}, "writes nothing"), ({"data_parallel": "SOCKET"}, "cannot be chosen")],
)
def test_writers_that_are_not_here_are_refused(writer, match):
    with pytest.raises(ds_core.DsError, match=match):
        make_engine(writer=writer)
