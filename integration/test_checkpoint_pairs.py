"""Any layout loads what any other saved: stage x ranks x offload, bit for bit, and no byte more.

Each layout trains one small model for two steps and saves it. Then each (stage, ranks) loads the
checkpoint of every other, its states in each place in turn, compares its share of the parameters
and of the optimizer's state with what the saver had, and counts the bytes that it read of data
files.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_core
from ds_core.checkpoint import FlatShard
from ds_core.checkpoint.index import Index
from ds_core.testing import run_ranks

STAGES, RANKS = (0, 1, 2, 3), (1, 2, 3, 4)
#: Where optimizer states live. Stage 0 shards nothing, so it offloads nothing.
OFFLOADS = (None, "cpu", "nvme")
LAYOUTS = [
    (stage, ranks, offload)
    for stage, ranks, offload in itertools.product(STAGES, RANKS, OFFLOADS)
    if stage > 0 or offload is None
]
FORMATS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
#: One layout of each stage, each at another number of ranks, for the other number formats.
SOME = [(0, 2, None), (1, 3, None), (2, 1, None), (3, 4, None)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(7), nn.Linear(7, 7)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Net(nn.Module):
    """Odd sizes, a tied head, a frozen matrix, a scalar, a parameter that is never used, a buffer,
    and an embedding of more than one checksummed block."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11003, 7)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.frozen = nn.Linear(7, 7, bias=False).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(7, 11003, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(5, dtype=torch.int64))

    def forward(self, ids):
        self.seen += 1
        x = self.frozen(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        return (x * self.scale).float().square().mean() + self.head.weight[:9].float().sum()


def make(stage, offload, folder, changes, seed):
    torch.manual_seed(seed)
    model = Net()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.02},
    ]
    zero = {"stage": stage}
    if offload is not None:
        zero["offload_optimizer"] = {"device": offload}
        if offload == "nvme":
            zero["offload_optimizer"]["nvme_path"] = folder
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "progress": False,
        **changes,
    }
    return ds_core.initialize(model, config, optimizer=torch.optim.AdamW(groups, lr=0.01))


def shares(engine):
    """This rank's parts of parameters, moments and step counts: {name: (start, values)}."""
    state = {f"model.{name}": value for name, value in engine.sharding.model_state().items()}
    for key, by_name in engine.sharding.state_dict()["state"].items():
        state |= {f"optimizer.{key}.{name}": value for name, value in by_name.items()}
    state["model.seen"] = engine.module.seen
    found = {}
    for name, value in state.items():
        if isinstance(value, FlatShard):
            with value.opened() as local:  # on disk, if that is where it lives
                found[name] = (value.start, local.clone(), tuple(value.shape))
        else:
            value = torch.as_tensor(value).detach()
            found[name] = (0, value.reshape(-1).clone(), tuple(value.shape))
    return found


def train_and_save(folder, stage, offload, changes):
    engine = make(stage, offload, f"{folder}/swap", changes, seed=1)
    for step in range(2):
        ids = torch.arange(8) * 1371 + 31 * step + dist.get_rank()
        engine.backward(engine(ids))
        engine.step()
    engine.save_checkpoint(folder, "two", client_state={"stage": stage})
    mine = shares(engine)
    engine.close()
    return mine


def joined(by_rank):
    """Whole tensors of the ranks' parts, flat; every element of which some rank must hold."""
    whole = {}
    for mine in by_rank:
        for name, (start, values, shape) in mine.items():
            numel = torch.Size(shape).numel()
            flat, held = whole.setdefault(
                name, (torch.zeros(numel, dtype=values.dtype), torch.zeros(numel, dtype=torch.bool))
            )
            flat[start : start + values.numel()] = values
            held[start : start + values.numel()] = True
    assert all(held.all() for _, held in whole.values())
    return {name: flat for name, (flat, _) in whole.items()}


class Store:
    """Checkpoints by layout, each made once, and what their savers had in memory."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, layout, number_format):
        path = self.folder / "-".join(map(str, (*layout, number_format)))
        if not path.exists():
            stage, ranks, offload = layout
            changes = FORMATS[number_format]
            held = run_ranks(ranks, train_and_save, str(path), stage, offload, changes)
            torch.save(joined(held), path / "truth.pt")
        return str(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("pairs"))


class CountingFile(io.FileIO):
    """A file that counts what is read of it."""

    total = 0

    def read(self, size=-1):
        data = super().read(size)
        CountingFile.total += len(data)
        return data

    def readinto(self, buffer):
        count = super().readinto(buffer)
        CountingFile.total += count
        return count


@contextlib.contextmanager
def counting_reads():
    """Inside, whoever opens a data file gets one that counts."""
    plain = builtins.open

    def counted(file, mode="r", *arguments, **options):
        if str(file).endswith(".safetensors") and mode == "rb":
            return CountingFile(file, mode)
        return plain(file, mode, *arguments, **options)

    CountingFile.total = 0
    builtins.open = counted
    try:
        yield
    finally:
        builtins.open = plain


def load_all(paths, stage, offload, changes, folder):
    engine = make(stage, offload, folder, changes, seed=2)
    for path in paths:
        with counting_reads():
            client = engine.load_checkpoint(path)
        read = CountingFile.total
        assert client == {"stage": int(Path(path).name[0])}, path
        assert engine.global_step == 2
        assert [group["lr"] for group in engine.sharding.param_groups] == [0.01, 0.02]
        check_share(path, shares(engine), read)
        check_model(path, engine)
    engine.close()


def check_share(path, mine, read):
    """This rank has exactly its part of what was saved, and read nothing else."""
    truth = torch.load(f"{path}/truth.pt")
    index = Index.read(Path(path) / "two")
    owned = 0
    for name, (start, values, _) in mine.items():
        if name not in truth:
            # Never stepped, so never saved: a new state.
            assert ".unused" in name, name
            assert not values.any(), name
            continue
        expected = truth[name][start : start + values.numel()]
        if "frozen" in name:
            expected = expected.to(values.dtype)  # it has no master copy
        assert values.dtype == expected.dtype, (path, name)
        assert torch.equal(values, expected), (path, name)
        owned += values.numel() * index.tensors[name].dtype.itemsize
    assert read == owned, f"{path}: read {read} bytes, holds {owned}"


def check_model(path, engine):
    """The model computes with what was loaded, in its own number format."""
    truth = torch.load(f"{path}/truth.pt")
    for name, value in engine.state_dict().items():
        if name != "head.weight":
            expected = truth[f"model.{name}"].to(value.dtype)
            assert torch.equal(value.reshape(-1), expected), (path, name)


def names(layout):
    stage, ranks, offload = layout
    return f"stage{stage}-N{ranks}" + (f"-{offload}" if offload else "")


@pytest.mark.parametrize("layout", LAYOUTS, ids=names)
def test_every_layout_loads_what_any_other_saved(store, layout, tmp_path):
    stage, ranks, offload = layout
    # Together the loaders of one (stage, ranks) load what each other one saved. Where states live
    # takes turns on both sides: it makes no difference to a checkpoint, as the next test shows.
    turns = itertools.cycle(OFFLOADS)
    savers = [(s, n, next(turns) if s else None) for s, n in itertools.product(STAGES, RANKS)]
    if stage > 0:
        savers = savers[(OFFLOADS.index(offload) + stage + ranks) % len(OFFLOADS) :: len(OFFLOADS)]
    paths = [store.path(saver, "fp32") for saver in savers]
    run_ranks(ranks, load_all, paths, stage, offload, {}, str(tmp_path), timeout_s=120)


def contents(path):
    """Paths, dtypes, shapes, boxes, files and checksums. Not places in a file: what is read from
    disk is written first."""
    return {
        name: (
            record.path,
            record.dtype,
            record.shape,
            [(stored.box, stored.file, stored.entry, stored.crc32) for stored in record.boxes],
        )
        for name, record in Index.read(path).tensors.items()
    }


def test_where_states_live_does_not_show_in_a_checkpoint(store):
    for layout in LAYOUTS:
        own = Path(store.path(layout, "fp32")) / "two"
        plain = Path(store.path((*layout[:2], None), "fp32")) / "two"
        assert contents(own) == contents(plain), names(layout)


@pytest.mark.parametrize("saved_as", FORMATS)
@pytest.mark.parametrize("layout", SOME, ids=names)
def test_a_master_copy_goes_to_every_layout(store, layout, saved_as, tmp_path):
    stage, ranks, offload = layout
    paths = [store.path(saver, saved_as) for saver in SOME]
    changes = FORMATS["bf16"]
    run_ranks(ranks, load_all, paths, stage, offload, changes, str(tmp_path), timeout_s=120)
