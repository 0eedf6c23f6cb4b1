"""Real checkpoints of DeepSpeed 0.19.8 (scripts/make_deepspeed_checkpoints.py), imported."""

from __future__ import annotations

import os
import tarfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ds_core
from ds_core import comm
from ds_core.checkpoint import full_state_dict, import_checkpoint, importing, inspect, verify
from ds_core.checkpoint.foreign import deepspeed
from ds_core.checkpoint.lazy import open_checkpoint
from ds_core.checkpoint.unpickling import load_torch_file
from ds_core.errors import CheckpointError
from ds_core.testing import truncate

DATA = Path(__file__).parent / "data" / "deepspeed"
CASES = sorted(path.name.removesuffix(".tar.xz") for path in DATA.glob("*.tar.xz"))
TRAINED = ["embed.weight", "gain", "hidden.bias", "hidden.weight", "out.weight"]


class Tiny(nn.Module):
    """The model of scripts/make_deepspeed_checkpoints.py."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.frozen = nn.Linear(5, 5)
        self.hidden = nn.Linear(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.arange(5.0))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        x = self.frozen(self.embed(ids)) + self.offset.to(self.gain.dtype)
        x = self.out(torch.tanh(self.hidden(x))) * self.gain
        return nn.functional.cross_entropy(self.head(x).float(), ids)


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


def unpacked(case, folder):
    with tarfile.open(DATA / f"{case}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / case


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """A checkpoint of DeepSpeed, and what DeepSpeed's own tools say it holds."""
    folder = unpacked(request.param, tmp_path)
    return folder, load_file(folder / "expected.safetensors")


def test_weights_are_those_that_deepspeed_reads(case, tmp_path):
    folder, expected = case
    report = import_checkpoint(folder, tmp_path / "ours")
    weights = full_state_dict(report.path)
    reference = {k.removeprefix("fp32."): v for k, v in expected.items() if k.startswith("fp32.")}
    reference = reference or {name: expected[name] for name in TRAINED}
    for name, value in reference.items():
        assert torch.equal(weights[name].float(), value.float()), name
    assert (report.missing, report.unexpected) == ((), ())
    assert torch.equal(weights["head.weight"], weights["embed.weight"])
    assert set(weights) == set(Tiny().state_dict())


def test_moments_are_those_of_deepspeeds_own_converter(case, tmp_path):
    folder, expected = case
    report = import_checkpoint(folder, tmp_path / "ours")
    tensors = open_checkpoint(report.path).tensors
    # There DeepSpeed takes an empty step when it starts, so as to allocate its states.
    steps = 4 if folder.name == "stage0-bf16-w2" else 3
    for name in TRAINED:
        assert tensors[f"optimizer.step.{name}"].read() == steps
        for key in ("exp_avg", "exp_avg_sq"):
            ours = tensors[f"optimizer.{key}.{name}"].read()
            # DeepSpeed's converter mixes moments up in one case, in which it is no reference.
            assert torch.equal(ours, expected.get(f"{key}.{name}", ours)), (key, name)


def engine_like(case):
    precision = next((p for p in ("bf16", "fp16") if p in case), None)
    several = not case.startswith("stage0")
    torch.manual_seed(9)
    model = Tiny()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "weight_decay": 0.0}]
    if several:
        matrices = [p for p in trained if p.dim() > 1]
        groups = [{"params": matrices}, {"params": [p for p in trained if p.dim() <= 1]}]
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0, "progress": False}
    if precision:
        config[precision] = {"enabled": True}
    return ds_core.initialize(model, config, optimizer=torch.optim.AdamW(groups, lr=9.0))


def step_four(engine, world_size):
    """DeepSpeed's fourth step; one process takes the batches of all ranks."""
    batches = [(torch.arange(4) * 3 + 3 * 2 + rank) % 7 for rank in range(world_size)]
    loss = engine(torch.cat(batches))
    engine.backward(loss)
    engine.step()


def test_training_goes_on_as_deepspeed_does(case, tmp_path):
    folder, expected = case
    report = import_checkpoint(folder, tmp_path / "ours")
    engine = engine_like(folder.name)
    assert engine.load_checkpoint(tmp_path / "ours") == {"note": "three steps"}
    assert engine.global_step == 3
    step_four(engine, 2 if "w2" in folder.name else 1)
    engine.save_checkpoint(tmp_path / "next")
    after, before = full_state_dict(tmp_path / "next"), full_state_dict(report.path)
    exact = "fp32" in folder.name
    for name in TRAINED:
        moved, should = after[name] - before[name], expected[f"next.{name}"] - before[name]
        assert should.abs().max() > 1e-3  # the step is large compared with what is tolerated
        torch.testing.assert_close(moved, should, rtol=0, atol=2e-7 if exact else 1e-3)


def test_settings_of_each_group_and_of_the_scale_come_along(tmp_path):
    folder = unpacked("stage2-fp16-w2", tmp_path)
    path = import_checkpoint(folder, tmp_path / "ours").path
    values = open_checkpoint(path).values
    matrices, rest = values["groups"]
    assert matrices["names"] == ["embed.weight", "hidden.weight", "out.weight"]
    assert (matrices["weight_decay"], rest["weight_decay"], rest["lr"]) == (0.1, 0.0, 0.01)
    assert values["engine"]["loss_scale"]["scale"] == 256.0
    assert values["lr_scheduler"]["last_epoch"] == 3
    found = inspect(path)
    assert found.frozen == ("frozen.weight", "frozen.bias")
    assert found.aliases == {"head.weight": "embed.weight"}
    assert found.bytes_by_kind["buffers"] == 20


@pytest.mark.parametrize("case", ["stage1-fp32-w2", "stage3-bf16-w2"])
def test_the_universal_format_holds_the_same(case, tmp_path):
    folder = unpacked(case, tmp_path)
    direct = open_checkpoint(import_checkpoint(folder, tmp_path / "direct").path)
    report = import_checkpoint(folder / "universal", tmp_path / "universal")
    through = open_checkpoint(report.path)
    assert "universal format" in report.source
    assert direct.tensors.keys() == through.tensors.keys()
    for name, tensor in direct.tensors.items():
        assert torch.equal(tensor.read(), through.tensors[name].read()), name
    assert direct.values["groups"] == through.values["groups"]


def test_releases_that_tell_no_addresses_are_read(tmp_path):
    folder = unpacked("stage2-bf16-w2", tmp_path)
    expected = open_checkpoint(import_checkpoint(folder, tmp_path / "new").path)
    for path in (folder / "three").glob("*optim_states.pt"):
        change(path, lambda c: c["optimizer_state_dict"].pop("param_slice_mappings"))
        change(path, lambda c: c["optimizer_state_dict"].pop("param_alignment_paddings"))
    found = open_checkpoint(import_checkpoint(folder, tmp_path / "old").path)
    for name, tensor in expected.tensors.items():
        assert torch.equal(tensor.read(), found.tensors[name].read()), name


def change(path, edit):
    """Rewrite a file of DeepSpeed's; its classes become the plain values that stand for them."""
    content = load_torch_file(path, allow=deepspeed._ALLOWED)
    content.get("optimizer_state_dict", {}).pop("loss_scaler", None)
    edit(content)
    torch.save(content, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def test_an_optimizer_that_counts_steps_per_group_is_read(tmp_path):
    folder = unpacked("stage3-fp32-w1", tmp_path)

    def count_per_group(content):
        base = content["optimizer_state_dict"]["optimizer_state_dict"]
        for state, group in zip(base["state"].values(), base["param_groups"], strict=True):
            group["step"] = int(state.pop("step"))

    change(only(folder, "*optim_states.pt"), count_per_group)
    found = open_checkpoint(import_checkpoint(folder, tmp_path / "ours").path)
    assert all(found.tensors[f"optimizer.step.{name}"].read() == 3 for name in TRAINED)
    assert "step" not in found.values["groups"][0]


def only(folder, pattern):
    (path,) = (folder / "three").glob(pattern)
    return path


def test_the_flat_master_copy_of_stage_0_is_taken_apart(tmp_path):
    folder = unpacked("stage0-bf16-w2", tmp_path)
    expected = open_checkpoint(import_checkpoint(folder, tmp_path / "apart").path)

    def flatten(content):
        for name in ("frozen.weight", "frozen.bias"):
            del content["module"][name]
        optimizer = content["optimizer"]
        inner = optimizer["optimizer_state_dict"]
        optimizer["fp32_groups_flat"] = [
            torch.cat([master.flatten() for master in optimizer.pop("fp32_groups")[0]])
        ]
        states = inner["state"].values()
        flat = {k: torch.cat([s[k].flatten() for s in states]) for k in ("exp_avg", "exp_avg_sq")}
        inner["state"] = {0: {"step": torch.tensor(4.0), **flat}}
        inner["param_groups"][0]["params"] = [0]

    change(only(folder, "*model_states.pt"), flatten)
    found = open_checkpoint(import_checkpoint(folder, tmp_path / "flat").path)
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor.read(), expected.tensors[name].read()), name


def test_states_of_stage_0_without_names_are_refused_if_several_would_fit(tmp_path):
    folder = unpacked("stage0-fp32-w1", tmp_path)
    # Two layers have the same shapes now, and only one of them was trained.
    twin = {"frozen.weight": torch.ones(3, 5), "frozen.bias": torch.ones(3)}
    change(only(folder, "*model_states.pt"), lambda c: c["module"].update(twin))
    with pytest.raises(CheckpointError, match=r"stage 0 does not save names, and its 5 states fit"):
        import_checkpoint(folder, tmp_path / "ours")
    report = import_checkpoint(folder, tmp_path / "ours", weights_only=True)
    assert set(report.num_bytes) == {"parameters", "buffers"}


# --- What is refused ------------------------------------------------------------------------------


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("pattern", ["*model_states.pt", "*optim_states.pt"])
@pytest.mark.parametrize("drop", [False, True], ids=["refused", "even-when-dropping"])
def test_a_pickle_that_runs_code_is_refused_by_name(tmp_path, pattern, drop):
    folder = unpacked("stage1-fp32-w2", tmp_path)
    path = sorted((folder / "three").glob(pattern))[0]
    torch.save({"module": Attack(tmp_path / "ran"), "optimizer_state_dict": 0}, path)
    with pytest.raises(CheckpointError, match=r"refused to unpickle: it asks for .*system"):
        import_checkpoint(folder, tmp_path / "ours", drop_objects=drop)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "ours").exists()


class Settings:
    """An object of a user, as Megatron's arguments are."""

    def __init__(self):
        self.layers = 3


def test_objects_of_a_user_are_refused_or_left_out(tmp_path):
    folder = unpacked("stage2-bf16-w2", tmp_path)
    path = only(folder, "*model_states.pt")
    change(path, lambda c: c.update(args=Settings(), random=torch.ones(2)))
    with pytest.raises(CheckpointError, match=r"asks for .*Settings.*--drop-objects"):
        import_checkpoint(folder, tmp_path / "ours")
    report = import_checkpoint(folder, tmp_path / "ours", drop_objects=True)
    assert report.ignored["client.args"] == "an object of class Settings"
    client = open_checkpoint(report.path)
    assert client.values["client"] == {"note": "three steps"}
    assert torch.equal(client.tensors["client.random"].read(), torch.ones(2))


def test_an_incomplete_checkpoint_is_named(tmp_path):
    folder = unpacked("stage2-bf16-w2", tmp_path)
    path = folder / "three" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: 2 ranks saved it, .* 1 are there"):
        import_checkpoint(folder, tmp_path / "ours")
    path.with_name("bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt is mis"):
        import_checkpoint(folder, tmp_path / "ours")


@pytest.mark.parametrize("entry", ["module", "param_shapes"])
def test_an_entry_that_is_missing_is_named(tmp_path, entry):
    folder = unpacked("stage2-bf16-w2", tmp_path)
    path = only(folder, "*model_states.pt")
    content = load_torch_file(path, allow=deepspeed._ALLOWED, drop_objects=True)
    del content[entry]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"entry '{entry}' is missing"):
        import_checkpoint(folder, tmp_path / "ours")


def test_a_truncated_file_is_named(tmp_path):
    folder = unpacked("stage2-bf16-w2", tmp_path)
    path = only(folder, "*model_states.pt")
    truncate(path, 1000)
    with pytest.raises(CheckpointError, match=rf"{path.name} cannot be read, it is damaged"):
        import_checkpoint(folder, tmp_path / "ours")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("mp_rank_01_model_states.pt", "tensor-parallel"),
        ("layer_00-model_states.pt", "pipeline"),
        ("layer_0_expert_0_mp_rank_00_model_states.pt", "mixture-of-experts"),
    ],
)
def test_what_only_deepspeed_can_undo_is_refused(tmp_path, file, message):
    folder = unpacked("stage2-bf16-w2", tmp_path)
    (folder / "three" / file).touch()
    with pytest.raises(CheckpointError, match=rf"{message}.*ds_to_universal"):
        import_checkpoint(folder, tmp_path / "ours")


def test_a_weight_that_disagrees_with_its_master_copy_is_reported(tmp_path):
    folder = unpacked("stage2-bf16-w2", tmp_path)
    change(only(folder, "*model_states.pt"), lambda c: c["module"]["hidden.bias"].add_(1))
    with pytest.raises(CheckpointError, match=r"unexpected: hidden.bias: its fp32 copy and the"):
        import_checkpoint(folder, tmp_path / "ours")
    report = import_checkpoint(folder, tmp_path / "ours", strict=False)
    assert len(report.unexpected) == 1
    verify(report.path)


def test_a_frozen_weight_that_was_left_out_is_missing(tmp_path):
    folder = unpacked("stage2-bf16-w2", tmp_path)
    path = only(folder, "*model_states.pt")
    change(path, lambda c: [c[k].pop("frozen.bias") for k in ("module", "frozen_param_fragments")])
    with pytest.raises(CheckpointError, match=r"missing: frozen.bias: it is frozen, and was left"):
        import_checkpoint(folder, tmp_path / "ours")


def test_the_names_are_compared_with_a_model(tmp_path):
    folder = unpacked("stage3-bf16-w2", tmp_path)
    assert import_checkpoint(folder, tmp_path / "a", model=Tiny()).missing == ()
    other = Tiny()
    other.out = nn.Linear(3, 4)
    with pytest.raises(
        CheckpointError, match=r"out.bias: the model has it\n.*out.weight: its shape"
    ):
        import_checkpoint(folder, tmp_path / "b", model=other)
    assert not (tmp_path / "b").exists()


def test_a_tag_that_is_not_there_is_named(tmp_path):
    folder = unpacked("stage3-fp32-w1", tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tag 'seven'; it has \['three'\]"):
        import_checkpoint(folder, tmp_path / "ours", tag="seven")


def test_an_engine_loads_a_folder_of_deepspeed_as_it_is(tmp_path):
    folder = unpacked("stage0-fp32-w1", tmp_path)
    before = sorted(path.name for path in folder.iterdir())
    model = Tiny()
    engine = ds_core.initialize(
        model,
        {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.5}}},
    )
    engine.load_checkpoint(folder)
    expected = load_file(folder / "expected.safetensors")
    reference = expected.get("fp32.hidden.weight", expected.get("hidden.weight"))
    assert torch.equal(model.hidden.weight, reference)
    assert engine.global_step == 3
    assert engine.sharding.param_groups[0]["lr"] != 0.5
    assert sorted(path.name for path in folder.iterdir()) == before
    (states,) = folder.rglob("*model_states.pt")
    truncate(states, 100)
    with pytest.raises(CheckpointError, match="states"):
        engine.load_checkpoint(folder)
    assert not list(folder.glob(".import-*"))


@pytest.mark.parametrize("options", [{"load_module_only": True}, {"load_optimizer_states": False}])
def test_a_load_without_optimizer_copies_no_states_of_it(tmp_path, monkeypatch, options):
    folder = unpacked("stage1-fp32-w2", tmp_path)
    written = []
    save = importing.save_lazy

    def counted(directory, name, state, **facts):
        written.append(sorted({str(tensor.path[0]) for tensor in state.tensors.values()}))
        return save(directory, name, state, **facts)

    monkeypatch.setattr(importing, "save_lazy", counted)
    model = Tiny()
    config = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}
    engine = ds_core.initialize(model, config)
    engine.load_checkpoint(folder, **options)
    assert written == [["model"]]
    assert engine.global_step == (0 if "load_module_only" in options else 3)
    expected = load_file(folder / "expected.safetensors")
    reference = expected.get("fp32.hidden.weight", expected.get("hidden.weight"))
    assert torch.equal(model.hidden.weight, reference)
    assert engine.sharding.param_groups[0]["lr"] == 0.5


def test_a_copy_that_the_disk_has_no_room_for_is_not_begun(tmp_path, monkeypatch):
    folder = unpacked("stage1-fp32-w2", tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda path: usage(100, 90, 10))
    engine = ds_core.initialize(
        Tiny(), {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}
    )
    with pytest.raises(CheckpointError, match=r"takes 0\.00 GB in this format, and .* GB of room"):
        engine.load_checkpoint(folder)
    assert not list(folder.glob(".import-*"))
    with pytest.raises(CheckpointError, match="make room, or run `ds checkpoint import`"):
        import_checkpoint(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
