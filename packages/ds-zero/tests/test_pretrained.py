"""Starting from a Hugging Face folder: right values, and no whole copy on any rank."""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from zero_loops import adamw
from zero_models import Language, Stack

import ds_core
import ds_zero
from ds_core.errors import CheckpointError
from ds_core.precision import Precision
from ds_core.testing import RankFailure, run_ranks

WIDE, DEPTH = 1024, 12


class Wide(nn.Module):
    """48 MiB in blocks of 4 MiB, a buffer, a tied head and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDE)
        self.blocks = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(DEPTH))
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.head = nn.Linear(WIDE, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.zeros(3))
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x * self.gain) + self.offset.sum() + self.table.sum()


def write(model: nn.Module, folder: Path, *, files: int = 1, tied: str = "") -> dict[str, int]:
    """The folder as `save_pretrained` makes it: tied weights once, under the name asked for."""
    first = {id(p): name for name, p in model.named_parameters()}
    state = {
        name: value.detach().contiguous()
        for name, value in model.state_dict(keep_vars=True).items()
        if first.get(id(value), name) == name
    }
    if tied:
        kept = first[id(model.get_parameter(tied))]
        state[tied] = state.pop(kept)
    names = sorted(state)
    parts = [names[i::files] for i in range(files)]
    if files == 1:
        save_file(state, folder / "model.safetensors")
        return {name: value.nbytes for name, value in state.items()}
    weight_map = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return {name: value.nbytes for name, value in state.items()}


def made(seed: int, build: type[nn.Module] = Wide) -> nn.Module:
    torch.manual_seed(seed)
    model = build()
    for buffer in model.buffers():
        buffer.fill_(float(seed))
    return model


class Counting(io.FileIO):
    total = 0

    def readinto(self, buffer: memoryview) -> int:
        count = super().readinto(buffer)
        Counting.total += count
        return count


class Peak:
    """Growth of this process's resident memory inside the block, at most; and what was read."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        self.before = self._field("VmRSS")
        Counting.total = 0
        self._open = builtins.open

        def counted(file, mode="r", *rest, **options):
            if str(file).endswith(".safetensors"):
                return Counting(file, mode)
            return self._open(file, mode, *rest, **options)

        builtins.open = counted
        return self

    def __exit__(self, *_: object) -> None:
        builtins.open = self._open
        self.grown, self.read = self._field("VmHWM") - self.before, Counting.total

    @staticmethod
    def _field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def load_and_train(folder: str, stage: int) -> tuple[int, int, list[torch.Tensor]]:
    with ds_zero.Init(empty=True):  # or the code that it loads would count below
        small = nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2))
    ds_zero.load_pretrained(small, f"{folder}/small")
    with Peak() as peak:
        with ds_zero.Init(empty=True):
            model = Wide()
        loaded = ds_zero.load_pretrained(model, folder)
    assert loaded.num_tensors == len(list(model.parameters())) + 1
    assert (loaded.missing, loaded.unexpected) == ((), ())
    assert torch.equal(model.table, torch.arange(4.0))  # what is not saved is built
    optimizer = ds_zero.shard(model, adamw(model.parameters()), stage)
    truth = made(3)
    state = optimizer.full_state_dict()
    for name, value in truth.named_parameters():
        assert torch.equal(state[name], value), name
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.offset, truth.offset)
    ids = torch.arange(11)
    truth.table = torch.arange(4.0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), truth(ids))
    model(ids).square().mean().backward()
    optimizer.step()
    return peak.grown, peak.read


@pytest.mark.parametrize(("stage", "files"), [(1, 1), (2, 1), (3, 1), (3, 3)])
def test_a_folder_is_loaded_without_a_whole_copy(tmp_path: Path, stage: int, files: int):
    sizes = write(made(3), tmp_path, files=files)
    whole = sum(sizes.values())
    headers = sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little")
        for path in tmp_path.glob("*.safetensors")
    )
    (tmp_path / "small").mkdir()
    write(nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2)), tmp_path / "small")
    results = run_ranks(2, load_and_train, str(tmp_path), stage)
    # Every byte of a parameter is read by one rank; the buffer, of 12 bytes, by both.
    assert sum(read for _, read in results) == whole + 12 + 2 * headers
    for grown, read in results:
        assert abs(read - whole / 2) < 10_000 + headers
        assert grown < 0.6 * whole, f"grew by {grown / 2**20:.0f} of {whole / 2**20:.0f} MiB"


def load_into(folder: str, stage: int, how: str, dtype: torch.dtype | None) -> bool:
    """Whether a sharded `Language` has the folder's values, each way of loading it."""
    precision = Precision(compute=torch.bfloat16, master=torch.float32) if dtype else None
    if how == "after":
        torch.manual_seed(1)
        model = Language("tied")
        optimizer = ds_zero.shard(
            model, adamw(model.parameters()), stage, precision=precision, min_unit_numel=0
        )
        ds_zero.load_pretrained(model, folder)
    else:
        with ds_zero.Init(empty=how == "empty"):
            model = Language("tied")
        ds_zero.load_pretrained(model, folder)
        optimizer = ds_zero.shard(
            model, adamw(model.parameters()), stage, precision=precision, min_unit_numel=0
        )
    truth = made(3, Language)
    for name, value in truth.named_parameters():
        assert torch.equal(optimizer.full_parameter(name), value), name  # of the master copy
        seen = optimizer.full_state_dict()[name]
        assert torch.equal(seen, value.to(dtype or value.dtype)), name
    return True


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("how", ["empty", "values", "after"])
def test_every_way_to_a_sharded_model(tmp_path: Path, how: str, dtype: torch.dtype | None):
    write(made(3, Language), tmp_path)
    for stage in (1, 2, 3):
        assert all(run_ranks(2, load_into, str(tmp_path), stage, how, dtype))


def load_in_engine(
    folder: str, stage: int, bf16: bool, is_empty: bool, disk: str | None = None
) -> float:
    with ds_zero.Init(empty=is_empty, enabled=is_empty and stage > 0):
        model = Language("tied")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "progress": False,
    }
    if disk is not None:
        home = {"device": "nvme", "nvme_path": disk}
        config["zero_optimization"] |= {"offload_optimizer": home}
        config["zero_optimization"] |= {"offload_param": home} if stage == 3 else {}
    engine = ds_core.initialize(model, config)
    engine.load_pretrained(folder)
    truth = made(3, Language)
    for name, value in truth.named_parameters():
        assert torch.equal(engine.sharding.full_parameter(name), value), name
        assert torch.equal(engine.state_dict()[name], value.bfloat16() if bf16 else value), name
    ids = torch.arange(12).view(2, 6) % 7
    loss = engine(ids).float().square().mean()
    engine.backward(loss)
    engine.step()
    engine.close()
    return float(loss)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [1, 3])
def test_what_lives_on_disk_is_loaded_too(tmp_path: Path, stage: int, bf16: bool):
    write(made(3, Language), tmp_path)
    disk = str(tmp_path / "swap")
    on_disk = run_ranks(2, load_in_engine, str(tmp_path), stage, bf16, stage == 3, disk)
    assert on_disk == run_ranks(2, load_in_engine, str(tmp_path), stage, bf16, False)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_engine_starts_from_a_folder(tmp_path: Path, stage: int, bf16: bool):
    write(made(3, Language), tmp_path)
    for is_empty in (False, True):
        losses = run_ranks(2, load_in_engine, str(tmp_path), stage, bf16, is_empty)
        assert losses[0] == losses[1] > 0


def load_renamed(folder: str, strict: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    with ds_zero.Init(empty=True, dtype=torch.bfloat16):
        model = Stack()
    loaded = ds_zero.load_pretrained(
        model,
        folder,
        rename=lambda name: None if name.startswith("entry") else f"blocks.{name}",
        strict=strict,
    )
    for name, param in made(3, Stack).blocks.named_parameters():
        ours = model.blocks.get_parameter(name)
        assert torch.equal(ours, param.bfloat16()), name  # whole while it is in use
        assert ours.detach().dtype == torch.bfloat16
    assert model.entry.weight.isnan().all()  # nobody gave it a value
    return loaded.missing, loaded.unexpected


def test_names_are_mapped_and_values_converted(tmp_path: Path):
    state = {name: p.detach() for name, p in made(3, Stack).blocks.named_parameters()}
    save_file(
        {**state, "entry.weight": torch.ones(2), "more": torch.ones(1)}, tmp_path / "m.safetensors"
    )
    ((missing, unexpected), _) = run_ranks(2, load_renamed, str(tmp_path), False)
    assert missing == ("entry.bias", "entry.weight", "exit.bias", "exit.weight")
    assert unexpected == ("blocks.more",)
    with pytest.raises(RankFailure) as caught:
        run_ranks(2, load_renamed, str(tmp_path), True)
    for outcome in caught.value.outcomes:
        assert "the model has, but the files lack: entry.bias" in outcome.message
        assert "the files have, but the model lacks: blocks.more" in outcome.message


def load_tied(folder: str) -> bool:
    with ds_zero.Init(empty=True):
        model = Language("tied")
    ds_zero.load_pretrained(model, folder)
    return torch.equal(model.head.weight, made(3, Language).embed.weight)


def test_a_tied_weight_may_have_any_of_its_names(tmp_path: Path):
    write(made(3, Language), tmp_path, tied="head.weight")
    assert run_ranks(2, load_tied, str(tmp_path)) == [True, True]


def test_a_tied_weight_with_two_values_is_refused(tmp_path: Path):
    state = {name: v.clone() for name, v in made(3, Language).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    assert run_ranks(2, load_tied, str(tmp_path)) == [True, True]
    state["head.weight"][-1, -1] += 1  # only the last rank reads it
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RankFailure) as caught:
        run_ranks(2, load_tied, str(tmp_path))
    for outcome in caught.value.outcomes:
        assert "under which the files hold other values" in outcome.message


def load_plainly(folder: str) -> None:
    ds_zero.load_pretrained(Language("tied"), folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.unlink(), "holds no weights"),
        (lambda f: f.write_bytes(f.read_bytes()[:-9]), "damaged or cut off"),
        (lambda f: save_file({"embed.weight": torch.ones(2, 2)}, f), "the files have [2, 2]"),
    ],
    ids=["missing", "truncated", "other"],
)
def test_what_cannot_be_loaded_is_told_on_all_ranks(tmp_path: Path, spoil, message: str):
    write(made(3, Language), tmp_path)
    spoil(tmp_path / "model.safetensors")
    with pytest.raises(RankFailure) as caught:
        run_ranks(2, load_plainly, str(tmp_path))
    for outcome in caught.value.outcomes:
        assert outcome.type.endswith("CheckpointError")
        assert message in outcome.message


def test_a_plain_model_and_a_file_of_torch(tmp_path: Path):
    truth = made(3, Language)
    torch.save(truth.state_dict(), tmp_path / "pytorch_model.bin")
    model = made(4, Language)
    loaded = ds_zero.load_pretrained(model, tmp_path)
    assert loaded.num_tensors == len(list(truth.parameters()))
    for name, value in truth.named_parameters():
        assert torch.equal(model.get_parameter(name), value)


def test_a_model_on_the_meta_device_is_told_how_to_be_built(tmp_path: Path):
    write(made(3, Language), tmp_path)
    with torch.device("meta"):
        model = Language("tied")
    with pytest.raises(
        ds_zero.ShardError, match=r"build the model under ds_zero\.Init\(empty=True"
    ):
        ds_zero.load_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        ds_zero.load_pretrained(made(1, Language), tmp_path / "no")
