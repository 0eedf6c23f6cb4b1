"""transformers' own ZeRO-3 code on our sharded parameters: build, load, initialise, resize."""

from __future__ import annotations

import gc
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from ds_core.testing import run_ranks

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ZERO3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
VOCAB = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A small Llama with random weights, as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("llama")
    plain_llama(tied=False).save_pretrained(path / "untied")
    plain_llama(tied=True).save_pretrained(path / "tied")
    return str(path)


def llama_config(tied: bool) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )


def plain_llama(tied: bool) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(llama_config(tied))


def zero3(**more) -> object:
    """transformers' global configuration, as long as it is kept."""
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig({**ZERO3, **more})


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    with ds_zero.GatheredParameters(model.parameters()):
        return {name: param.detach().clone() for name, param in model.named_parameters()}


def same_everywhere(tensor: torch.Tensor) -> bool:
    both = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(both, tensor)
    return all(torch.equal(both[0], other) for other in both)


class Peak:
    """The most bytes of tensors in this process at any moment when parameters came or went."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gc.freeze()  # what exists already is neither searched nor counted
        self.most = live_bytes()
        for name in ("_take", "hold", "let_go", "touch"):
            monkeypatch.setattr(ds_zero.Init, name, self._watched(getattr(ds_zero.Init, name)))

    def _watched(self, method):
        def watched(*args, **kwargs):
            found = method(*args, **kwargs)
            self.most = max(self.most, live_bytes())
            return found

        return watched


def live_bytes() -> int:
    """Bytes of the tensors that are new since `gc.freeze`."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            with torch._C.DisableTorchFunctionSubclass():
                storages[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_from_pretrained_without_a_full_copy(folder: str, tied: bool):
    run_ranks(2, load_pretrained, folder, tied)


def load_pretrained(folder: str, tied: bool) -> None:
    truth = plain_llama(tied)
    numbers = sum(param.numel() for param in truth.parameters())
    largest = max(param.numel() for param in truth.parameters())
    config = zero3()
    with pytest.MonkeyPatch.context() as patch:
        peak = Peak(patch)
        path = os.path.join(folder, "tied" if tied else "untied")
        model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    # What transformers itself reads on rank 0 is the checkpoint; on the others it is on "meta".
    checkpoint = numbers if dist.get_rank() == 0 else 0
    assert peak.most <= 4 * (numbers / 2 + checkpoint + 2 * largest), peak.most / 4 / numbers
    assert peak.most > 4 * numbers / 2
    assert all("sharded" in repr(param) for param in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    values = whole(model)
    for name, param in truth.named_parameters():
        assert torch.equal(values[name], param), name
    ids = torch.arange(12).view(1, 12) + dist.get_rank()
    optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters()), 3)
    assert torch.equal(model(ids, labels=ids).loss, truth(ids, labels=ids).loss)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    del config


def test_from_config_is_initialised_by_rank0():
    run_ranks(2, build_from_config)


def build_from_config() -> None:
    torch.manual_seed(dist.get_rank())
    config = zero3(bf16={"enabled": True})
    model = transformers.AutoModelForCausalLM.from_config(llama_config(True), dtype=torch.bfloat16)
    assert all("sharded" in repr(param) for param in model.parameters())
    # transformers keeps `torch.arange` out of what Init decides, so that these stay precise.
    truth = plain_llama(True)
    inverse = model.model.rotary_emb.inv_freq
    assert inverse.dtype is torch.float32
    assert torch.equal(inverse, truth.model.rotary_emb.inv_freq)
    values = whole(model)
    for name, value in values.items():
        assert value.dtype is torch.bfloat16, name
        assert same_everywhere(value), name
    weight = values["model.layers.0.mlp.up_proj.weight"].float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(values["model.norm.weight"].float(), torch.ones(64))
    del config


def test_what_is_missing_in_the_checkpoint_is_initialised(folder: str):
    run_ranks(2, load_with_new_head, os.path.join(folder, "untied"))


def load_with_new_head(path: str) -> None:
    torch.manual_seed(dist.get_rank())
    config = zero3()
    model = transformers.LlamaForSequenceClassification.from_pretrained(
        path, num_labels=3, dtype=torch.float32
    )
    values = whole(model)
    assert values["score.weight"].shape == (3, 64)
    assert values["score.weight"].std().item() == pytest.approx(0.02, rel=0.3)
    assert same_everywhere(values["score.weight"])
    truth = dict(plain_llama(False).named_parameters())
    assert torch.equal(values["model.embed_tokens.weight"], truth["model.embed_tokens.weight"])
    del config


@pytest.mark.parametrize("size", [VOCAB + 8, VOCAB - 8], ids=["larger", "smaller"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resizing_embeddings(folder: str, tied: bool, size: int):
    run_ranks(2, resize, os.path.join(folder, "tied" if tied else "untied"), tied, size)


def resize(path: str, tied: bool, size: int) -> None:
    torch.manual_seed(dist.get_rank())
    config = zero3()
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.resize_token_embeddings(size)
    truth = plain_llama(tied)
    kept = min(size, VOCAB)
    optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters()), 3)
    found = optimizer.full_state_dict()
    names = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    for name in names:
        assert found[name].shape == (size, 64)
        assert torch.equal(found[name][:kept], dict(truth.named_parameters())[name][:kept])
        assert torch.isfinite(found[name]).all()
        assert same_everywhere(found[name])
    ids = torch.arange(6).view(1, 6)
    assert model(ids).logits.shape == (1, 6, size)
    del config
