"""Every place at which somebody else's file is read, fed with pickles that would run code."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pickle
import runpy
import subprocess
import sys
import tarfile
import types
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import ds_core
from ds_core import comm
from ds_core.checkpoint import import_checkpoint, inspect, load, load_weights, save, verify
from ds_core.errors import CheckpointError
from ds_core.testing.original import original_deepspeed

DATA = Path(__file__).parent / "data" / "deepspeed"


#: What DeepSpeed's files hold beside tensors and numbers.
DEEPSPEEDS_CLASSES = [
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
]


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


class Calls:
    """Pickles as a call of a function, which whoever unpickles it makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def runs_command(marker):
    return Calls(os.system, f"touch {marker}")


def runs_text(marker):
    return Calls(builtins.exec, f"open({str(marker)!r}, 'w').close()")


def runs_file(marker):
    script = marker.with_name("script.py")
    script.write_text(f"open({str(marker)!r}, 'w').close()")
    return Calls(runpy.run_path, str(script))


def hides_in_bytes(marker):
    """A function of torch's own, that unpickles the bytes that it is given."""
    buffer = io.BytesIO()
    torch.save({"x": runs_text(marker)}, buffer)
    return Calls(torch.storage._load_from_bytes, buffer.getvalue())


def hides_in_attribute(marker):
    return Calls(getattr, Calls(__import__, "os"), "getcwd")


ATTACKS = {
    "os.system": runs_command,
    "builtins.exec": runs_text,
    "runpy.run_path": runs_file,
    "torch.storage._load_from_bytes": hides_in_bytes,
    "builtins.getattr": hides_in_attribute,
}


@pytest.fixture(params=ATTACKS.values(), ids=ATTACKS)
def attack(request, tmp_path):
    """An object that leaves a mark if it is unpickled; checked to do so, and not to have done."""
    marker = tmp_path / "ran"
    found = request.param(marker)
    if request.param is not hides_in_attribute:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pickle.loads(pickle.dumps(found))
        assert marker.exists(), "the attack is none"
        marker.unlink()
    yield found
    assert not marker.exists(), "code of the file ran"


def refused(call):
    """The text of the error of a call that must end in one."""
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


# ---------------------------------------------------------------------- DeepSpeed


def put_into(path, attack):
    """Add the attack to what a torch file holds."""
    with stand_ins():
        content = torch.load(path, map_location="cpu", weights_only=False)
        content["extra"] = attack
        torch.save(content, path)


@contextlib.contextmanager
def stand_ins():
    """Without DeepSpeed: modules with empty classes for those that its files name."""
    if original_deepspeed() is not None:
        yield
        return
    modules = {}
    for home, name in DEEPSPEEDS_CLASSES:
        parts = home.split(".")
        for count in range(1, len(parts) + 1):
            full = ".".join(parts[:count])
            modules.setdefault(full, types.ModuleType(full))
        setattr(modules[home], name, type(name, (int,), {"__module__": home}))
    with mock.patch.dict(sys.modules, modules):
        yield


def deepspeed_folder(tmp_path, case):
    with tarfile.open(DATA / f"{case}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / case


@pytest.mark.parametrize(
    ("case", "pattern"),
    [
        ("stage1-fp32-w2", "three/mp_rank_00_model_states.pt"),
        ("stage1-fp32-w2", "three/*zero_pp_rank_1_*optim_states.pt"),
        ("stage3-bf16-w2", "three/zero_pp_rank_0_*model_states.pt"),
        ("stage3-bf16-w2", "three/*zero_pp_rank_0_*optim_states.pt"),
    ],
)
def test_deepspeeds_files(tmp_path, attack, case, pattern):
    folder = deepspeed_folder(tmp_path, case)
    [path] = folder.glob(pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        put_into(path, attack)
    text = refused(lambda: import_checkpoint(folder, tmp_path / "ours"))
    assert "refused to unpickle" in text
    assert "can make its reader run any code" in text
    assert path.name in text
    assert not (tmp_path / "ours").exists()
    # Without its objects the file is read, or refused all the same, and nothing runs either.
    with contextlib.suppress(CheckpointError):
        import_checkpoint(folder, tmp_path / "ours", drop_objects=True)


def test_deepspeeds_universal_files(tmp_path, attack):
    folder = deepspeed_folder(tmp_path, "stage1-fp32-w2")
    path = folder / "universal" / "zero" / "out.weight" / "exp_avg.pt"
    torch.save({"param": torch.ones(5, 3), "extra": attack}, path)
    text = refused(lambda: import_checkpoint(folder / "universal", tmp_path / "ours"))
    assert "refused to unpickle" in text
    assert "exp_avg.pt" in text


# ---------------------------------------------------------------------- torch


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_metadata_of_torchs_distributed_checkpoint(tmp_path, attack):
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(attack))
    text = refused(lambda: import_checkpoint(tmp_path / "dcp", tmp_path / "ours"))
    assert "refused to unpickle" in text
    assert ".metadata" in text


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_value_of_torchs_distributed_checkpoint(tmp_path, attack):
    state = {"model": {"w": torch.ones(3)}, "note": attack}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    text = refused(lambda: import_checkpoint(tmp_path / "dcp", tmp_path / "ours"))
    assert "refused to unpickle" in text


def zip_file(path, content):
    torch.save(content, path)


def old_file(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare_pickle(path, content):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [zip_file, old_file, bare_pickle])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_weights_of_torch(tmp_path, attack, write, name):
    (tmp_path / "theirs").mkdir()
    write(tmp_path / "theirs" / name, {"w": torch.ones(3), "extra": attack})
    for source in (tmp_path / "theirs", tmp_path / "theirs" / name):
        text = refused(lambda s=source: import_checkpoint(s, tmp_path / "ours"))
        assert "refused to unpickle" in text or "cannot be read" in text
        refused(lambda s=source: load_weights(s, {"w": torch.zeros(3)}))


def test_an_engine_that_starts_from_weights_of_torch(tmp_path, attack):
    model = nn.Linear(3, 3)
    torch.save({**model.state_dict(), "extra": attack}, tmp_path / "pytorch_model.bin")
    engine = ds_core.initialize(
        model,
        {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "progress": False,
        },
    )
    assert "refused to unpickle" in refused(lambda: engine.load_pretrained(tmp_path))


def test_the_command_says_why(tmp_path):
    torch.save({"w": torch.ones(3), "x": runs_command(tmp_path / "ran")}, tmp_path / "model.bin")
    done = subprocess.run(
        [sys.executable, "-m", "ds_core.cli", "checkpoint", "import", "model.bin", "ours"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    told = " ".join((done.stdout + done.stderr).split())
    assert "refused to unpickle" in told
    assert "system" in told
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------- our own format


@pytest.mark.parametrize("file", ["index.json", "rank_00000.safetensors"])
def test_a_pickle_in_the_place_of_our_own_files(tmp_path, attack, file):
    path = save(tmp_path, "a", {"w": torch.ones(3), "step": 1})
    (path / file).write_bytes(pickle.dumps(attack))
    for call in (
        lambda: load(tmp_path, state={"w": torch.zeros(3), "step": 0}),
        lambda: verify(tmp_path),
    ):
        text = refused(call)
        assert "damaged" in text or "truncated" in text
    if file == "index.json":
        refused(lambda: inspect(tmp_path))


def test_a_pickle_in_the_place_of_safetensors(tmp_path, attack):
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps({"w": attack}))
    assert "not a safetensors file" in refused(
        lambda: load_weights(tmp_path, {"w": torch.zeros(3)})
    )
