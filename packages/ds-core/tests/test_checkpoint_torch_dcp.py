"""torch's own distributed checkpoints, made by and loaded into real FSDP2 on real ranks."""

from __future__ import annotations

import io
import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import ds_core
from ds_core import comm
from ds_core.checkpoint import export_dcp, full_state_dict, import_checkpoint, save
from ds_core.checkpoint.lazy import open_checkpoint
from ds_core.errors import CheckpointError
from ds_core.testing import run_ranks, truncate

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FULL = StateDictOptions(full_state_dict=True)
CONFIG = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0, "progress": False}


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def sharded(seed):
    model = net(seed)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=0.02)


def step(model, optimizer, count):
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(4, 3, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def states(model, optimizer, style):
    if style == "torchtitan":
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        moments = get_optimizer_state_dict(model, optimizer, options=flat)
        return {**get_model_state_dict(model), "optimizer": moments, "lr_scheduler": {"e": 3}}
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments, "note": "hello"}


def full(model, optimizer):
    """Weights and moments, whole, on rank 0."""
    weights = get_model_state_dict(model, options=FULL)
    moments = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    flat = {f"{k}.{n}": t.clone() for n, state in moments.items() for k, t in state.items()}
    weights = {name: value.clone() for name, value in weights.items()}
    return weights | flat if dist.get_rank() == 0 else {}


def save_with_fsdp2(folder, style):
    model, optimizer = sharded(seed=1)
    step(model, optimizer, 3)
    dcp.save(states(model, optimizer, style), checkpoint_id=folder)
    before = full(model, optimizer)
    step(model, optimizer, 1)
    return before, full(model, optimizer)


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


@pytest.mark.parametrize("style", ["fsdp2", "torchtitan"])
def test_a_checkpoint_of_fsdp2_goes_on_in_an_engine(tmp_path, style):
    before, after = run_ranks(2, save_with_fsdp2, str(tmp_path / "theirs"), style)[0]
    report = import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert (report.missing, report.unexpected) == ((), ())
    tensors = open_checkpoint(report.path).tensors
    for name, value in before.items():
        ours = f"model.{name}" if f"model.{name}" in tensors else f"optimizer.{name}"
        assert torch.equal(tensors[ours].read(), value), name

    model = net(seed=8)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    # The groups stand in another order than in the one that was saved.
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": matrices}], lr=9.0)
    engine = ds_core.initialize(model, CONFIG, optimizer=optimizer)
    engine.load_checkpoint(tmp_path / "ours")
    assert engine.global_step == 3
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    engine.backward(engine(x).square().mean())
    engine.step()
    for name, value in engine.state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-6)


def load_with_fsdp2(folder):
    model, optimizer = sharded(seed=2)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optim": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return full(model, optimizer), [group["weight_decay"] for group in optimizer.param_groups]


def test_an_export_loads_into_fsdp2(tmp_path):
    torch.manual_seed(3)
    model = net(seed=3)
    matrices = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.3}
    rest = {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0}
    engine = ds_core.initialize(model, CONFIG, optimizer=torch.optim.AdamW([matrices, rest]))
    engine.backward(engine(torch.ones(4, 3)).square().mean())
    engine.step()
    engine.save_checkpoint(tmp_path / "ours")
    done = export_dcp(tmp_path / "ours", tmp_path / "theirs", optimizer=True)
    assert done.num_tensors == 4 * 4
    (found, decay), _ = run_ranks(2, load_with_fsdp2, str(tmp_path / "theirs"))
    assert decay == [0.3, 0.0]
    tensors = open_checkpoint(tmp_path / "ours").tensors
    for name, value in found.items():
        ours = f"model.{name}" if f"model.{name}" in tensors else f"optimizer.{name}"
        assert torch.equal(tensors[ours].read(), value), name


def test_an_export_reads_back_as_it_was(tmp_path):
    state = {
        "model": {"a.weight": torch.randn(5, 3), "scale": torch.tensor(2.0).bfloat16()},
        "optimizer": {
            "exp_avg": {"a.weight": torch.ones(5, 3)},
            "step": {"a.weight": torch.ones(())},
        },
        "groups": [{"lr": 0.1, "names": ["a.weight"]}],
    }
    save(tmp_path, "a", state)
    for key in ("model", ""):
        folder = tmp_path / f"dcp-{key}"
        export_dcp(tmp_path, folder, optimizer=True, model_key=key)
        again = open_checkpoint(import_checkpoint(folder, tmp_path / f"again-{key}").path)
        assert torch.equal(again.tensors["model.a.weight"].read(), state["model"]["a.weight"])
        assert torch.equal(again.tensors["model.scale"].read(), state["model"]["scale"])
        assert again.tensors["optimizer.exp_avg.a.weight"].shape == (5, 3)
        assert again.values["groups"] == state["groups"]


def test_an_export_converts_weights_and_leaves_a_full_folder_alone(tmp_path):
    save(tmp_path, "a", {"model": {"w": torch.randn(4)}})
    export_dcp(tmp_path, tmp_path / "out", dtype=torch.bfloat16)
    target = {"model": {"w": torch.zeros(4, dtype=torch.bfloat16)}}
    dcp.load(target, checkpoint_id=tmp_path / "out", no_dist=True)
    assert torch.equal(target["model"]["w"], full_state_dict(tmp_path)["w"].bfloat16())
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        export_dcp(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds no optimizer state"):
        export_dcp(tmp_path, tmp_path / "other", optimizer=True)


# --- What is refused ------------------------------------------------------------------------------


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.fixture
def theirs(tmp_path):
    folder = tmp_path / "theirs"
    dcp.save({"model": {"w": torch.randn(6, 2)}, "note": [1]}, checkpoint_id=folder, no_dist=True)
    return folder


def test_metadata_that_runs_code_is_refused_by_name(tmp_path, theirs):
    (theirs / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"refused to unpickle: it asks for posix\.system"):
        import_checkpoint(theirs, tmp_path / "ours")
    assert not (tmp_path / "ran").exists()


def test_a_value_that_runs_code_is_refused_by_name(tmp_path):
    theirs = tmp_path / "theirs"
    state = {"model": {"w": torch.ones(2)}, "note": Attack(tmp_path / "ran")}
    dcp.save(state, checkpoint_id=theirs, no_dist=True)
    with pytest.raises(CheckpointError, match=r"\(note\): refused to unpickle: it asks for posix"):
        import_checkpoint(theirs, tmp_path / "ours")
    assert not (tmp_path / "ran").exists()


def test_a_path_out_of_the_folder_is_refused(tmp_path, theirs):
    metadata = pickle.loads((theirs / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../secret"
    (theirs / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"is said to be in '\.\./secret', outside"):
        import_checkpoint(theirs, tmp_path / "ours")


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_truncated_file_is_named(tmp_path, theirs, file):
    truncate(theirs / file, 100)
    with pytest.raises(CheckpointError, match=rf"{file}.*cannot be read, it is damaged"):
        import_checkpoint(theirs, tmp_path / "ours")
    assert not (tmp_path / "ours" / "latest").exists()


def test_states_by_position_are_reported(tmp_path):
    model = net(seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, 1)
    state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=tmp_path / "theirs", no_dist=True)
    with pytest.raises(CheckpointError, match=r"keyed by position, not by name; save what"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_a_missing_box_is_reported(tmp_path, theirs):
    metadata = pickle.loads((theirs / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.w"].chunks.clear()
    (theirs / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"missing: model\.w: 0 of 12 elements are there"):
        import_checkpoint(theirs, tmp_path / "ours", strict=True)


def test_a_buffer_in_memory_is_read_like_a_file(tmp_path):
    from ds_core.checkpoint.unpickling import load_torch_file

    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    buffer.seek(0)
    assert torch.equal(load_torch_file(buffer, what="here")["a"], torch.ones(2))
