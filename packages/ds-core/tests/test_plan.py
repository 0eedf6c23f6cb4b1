"""Plans: models, devices, memory of transformers, step times, and what is refused."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from ds_core import planning
from ds_core.cli.app import make_app
from ds_core.errors import ConfigError, PlanError
from ds_core.planning.model_source import measure
from ds_core.planning.step_time import bubble_over_work, estimate_step
from ds_core.planning.transformer import TransformerShape

H100 = planning.find_device("h100")
BF16 = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
LLAMA3 = LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN3 = QWEN2 | {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
BERT = {
    "model_type": "bert",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30522,
}


@pytest.fixture
def hf_file(tmp_path):
    def write(values):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        return str(path)

    return write


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("values", "published"),
    [
        pytest.param(LLAMA, 6_738_415_616, id="llama-2-7b"),
        pytest.param(LLAMA3, 8_030_261_248, id="llama-3-8b"),
        pytest.param(QWEN2, 494_032_768, id="qwen2-0.5b"),
        pytest.param(QWEN3, 596_049_920, id="qwen3-0.6b"),
        pytest.param(GPT2, 124_439_808, id="gpt2"),
        pytest.param(BERT, 109_482_240, id="bert-base"),
    ],
)
def test_a_hugging_face_config_has_the_published_number_of_parameters(hf_file, values, published):
    assert planning.model_from(hf_file(values)).numel == published


@pytest.mark.parametrize("text", ["7B", "7e9", "7000m", "7_000_000_000"])
def test_a_number_of_parameters_is_met_exactly(text):
    assert planning.model_of_size(text).numel == 7_000_000_000


@pytest.mark.parametrize("numel", [1, 7, 1001, 10**6 + 1])
def test_any_number_of_parameters_is_met_exactly(numel):
    assert planning.model_of_size(str(numel)).numel == numel


MODEL_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 30)
    def forward(self, x):
        return self.linear(x).square().sum()

def model():
    return Net()

def example(micro_batch_size):
    return Net(), torch.zeros(micro_batch_size, 10)

def number():
    return 3

def broken():
    return Net(), torch.zeros(2, 11)
"""


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(MODEL_FILE)
    return path


def test_a_function_that_returns_a_batch_tells_activations_and_operations(model_file):
    source = planning.model_from(f"{model_file}:example", micro_batch=4)
    # Saved: the input and the output of the linear layer; 2 operations per weight, backward twice.
    assert source.measured.activation_bytes == 4 * 4 * (10 + 30)
    assert source.measured.flops == 3 * 2 * 4 * 10 * 30
    assert source.numel == 330


def test_a_function_that_returns_a_model_says_what_is_not_counted(model_file):
    source = planning.model_from(f"{model_file}:model")
    assert source.measured is None
    assert "let the function return (model, batch)" in source.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{file}:exampel", "no function 'exampel'; did you mean example"),
        ("{file}:number", "returned int, expected a torch.nn.Module"),
        ("{file}:broken", "fails on tensors without data: RuntimeError"),
        ("{file}", "expected a Hugging Face config.json, FILE.py:FUNCTION"),
        ("nowhere.py:f", "no such file"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError: No module named"),
        ("..relative:f", "cannot be imported: TypeError"),
        ("missing.json", "is not a readable JSON file"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused(model_file, text, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        planning.model_from(text.format(file=model_file))


def test_an_unknown_kind_of_model_says_which_are_known(hf_file):
    with pytest.raises(PlanError, match=r"model_type: got 'mixtral', expected one of llama"):
        planning.model_from(hf_file({"model_type": "mixtral"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, "got 0 attention heads, expected at least 1"),
        ({"intermediate_size": -4}, "intermediate: got -4, expected at least 1"),
    ],
    ids=["no-heads", "negative"],
)
def test_sizes_that_no_model_has_are_refused(hf_file, change, message):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 4, "vocab_size": 4}
    values = {"model_type": "llama", "num_attention_heads": 2, **sizes, **change}
    with pytest.raises(PlanError, match=message):
        planning.model_from(hf_file(values))


@pytest.mark.parametrize("value", [0, float("nan"), float("inf")])
def test_figures_that_no_device_has_are_refused(value):
    with pytest.raises(PlanError, match=r"memory_bytes: got .* expected a number above 0"):
        H100.with_overrides(memory_bytes=value)


@pytest.mark.parametrize("text", ["seven", "0", "-3", "7x", "", "1e400", "1e30"])
def test_a_number_of_parameters_that_is_none_is_refused(text):
    with pytest.raises(PlanError, match="--params: got"):
        planning.model_of_size(text)


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(PlanError, match="got 'h10'; did you mean h100"):
        planning.find_device("h10")


# ---------------------------------------------------------------------- memory and operations


class Llama(nn.Module):
    """A small Llama-like decoder, its attention fused."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.body = shape.build().to_empty(device="cpu")

    def forward(self, ids):
        x = self.body.embed(ids)
        for layer in self.body.layers:
            x = x + self.attention(layer, layer.attention_norm(x))
            h = layer.network_norm(x)
            h = F.silu(layer.gate(h)) * layer.up(h) if self.shape.is_gated else F.gelu(layer.up(h))
            x = x + layer.down(h)
        return F.cross_entropy(self.body.output(self.body.norm(x)).float().flatten(0, 1), ids[0])

    def attention(self, layer, x):
        batch, tokens, _ = x.shape
        q, k, v = (
            part.view(batch, tokens, -1, self.shape.head_width).transpose(1, 2)
            for part in (layer.query(x), layer.key(x), layer.value(x))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return layer.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations_of_the_formula_are_those_that_autograd_saves(is_gated, dtype):
    shape = TransformerShape(
        layers=4,
        hidden=64,
        intermediate=192,
        vocab=100,
        heads=4,
        kv_heads=4,
        head_width=16,
        is_gated=is_gated,
        norm_tensors=2,
    )
    model, ids = Llama(shape).to(dtype), torch.zeros(1, 128, dtype=torch.int64)
    found = measure(model, (ids,)).activation_bytes
    assert shape.activation_bytes(1, 128, dtype.itemsize) == pytest.approx(found, rel=0.15)


def test_operations_of_the_formula_are_those_that_torch_counts():
    shape = TransformerShape(
        layers=3, hidden=64, intermediate=192, vocab=100, heads=4, kv_heads=4, head_width=16
    )
    ids = torch.zeros(1, 128, dtype=torch.int64)
    # torch counts a causal attention whole.
    whole = shape.flops_per_sample(128, shape.matrix_params()) + 6 * 3 * 64 * 128**2
    assert measure(Llama(shape), (ids,)).flops == whole


@pytest.mark.parametrize(
    ("choice", "state"),
    [
        (None, 8),
        ({"type": "Adam"}, 8),
        ({"type": "SGD"}, 0),
        ({"type": "SGD", "params": {"momentum": 0.9}}, 4),
        ({"type": "AdamW", "params": {"amsgrad": True}}, 12),
        ({"type": "RMSprop", "params": {"centered": True, "momentum": 0.1}}, 12),
    ],
)
def test_optimizer_state_is_what_the_optimizer_keeps(choice, state):
    config = BF16 if choice is None else BF16 | {"optimizer": choice}
    cluster = planning.Cluster(1, 1, H100)
    plan = planning.make_plan(config, planning.model_of_size("1M"), cluster)
    assert plan.memory["optimizer"] == state * 1_000_000


def test_sixteen_bytes_per_parameter_at_stage_0():
    cluster = planning.Cluster(1, 8, H100)
    plan = planning.make_plan(BF16, planning.model_of_size("1B"), cluster)
    assert plan.costs.persistent_bytes == 16 * 10**9


# ---------------------------------------------------------------------- time


def test_a_prediction_for_16384_ranks_takes_less_than_a_second(hf_file):
    source = planning.model_from(hf_file(LLAMA3 | {"num_hidden_layers": 80}))
    cluster = planning.Cluster(2048, 8, H100)
    begin = time.process_time()
    planning.make_plan(BF16 | {"zero_optimization": {"stage": 0}}, source, cluster)
    assert time.process_time() - begin < 1.0


def test_more_nodes_make_the_wire_slower_not_the_arithmetic():
    source = planning.model_of_size("1B")
    one, many = (
        planning.make_plan(BF16, source, planning.Cluster(nodes, 8, H100)).time for nodes in (1, 64)
    )
    assert many.communication > one.communication
    assert many.forward == one.forward
    assert many.total == pytest.approx(many.compute + many.exposed)


def test_one_rank_sends_nothing():
    plan = planning.make_plan(BF16, planning.model_of_size("1B"), planning.Cluster(1, 1, H100))
    assert (plan.wire_bytes(), plan.time.communication, plan.time.bubble) == (0, 0, 0)


def test_a_pipeline_idles_by_its_stages_over_its_micro_batches():
    assert bubble_over_work(4, 12) == 3 / 12
    plan = planning.make_plan(BF16, planning.model_of_size("1B"), planning.Cluster(1, 1, H100))
    costs = planning.Costs("pipeline", plan.memory, 0, 0, 0, (), pipeline_stages=4)
    step = estimate_step(
        costs,
        cluster=plan.cluster,
        accumulation=12,
        flops=1e15,
        weight_bytes=1e9,
        itemsize=2,
        mfu=0.5,
    )
    assert step.bubble == pytest.approx((step.forward + step.backward) / 4)


# ---------------------------------------------------------------------- fitting and the command


def test_what_does_not_fit_is_told_with_changes_that_would():
    config = BF16 | {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 1}
    cluster = planning.Cluster(1, 8, H100.with_overrides(memory_bytes=40 * 2**30))
    plan = planning.make_plan(config, planning.model_of_size("1B"), cluster)
    found = planning.remedies(config, plan)
    assert not plan.fits
    assert all(remedy.plan.fits for remedy in found)
    assert any("micro-batch" in remedy.description for remedy in found)
    assert any("recompute" in remedy.description for remedy in found)
    assert {remedy.plan.config.train_batch_size for remedy in found} == {128}


def invoke(*words):
    return CliRunner().invoke(make_app(), list(words), catch_exceptions=True)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(BF16))
    return str(path)


def test_the_command_prints_the_figures(config_file):
    shown = invoke("plan", config_file, "--params", "1B", "--gpus-per-node", "4")
    assert shown.exit_code == 0
    for text in ("= between steps", "14.90 GiB", "all_reduce", "= step", "It fits"):
        assert text in shown.output


def test_the_command_prints_json(config_file):
    told = json.loads(invoke("plan", config_file, "--params", "1B", "--json").output)
    assert told["memory"]["persistent"] == 16 * 10**9
    assert told["wire"]["by_axis"]["dp"] == told["wire"]["sent_bytes"]
    assert told["time"]["step_s"] > 0


def test_the_command_exits_with_1_if_it_does_not_fit(config_file):
    shown = invoke("plan", config_file, "--params", "8B", "--gpu", "a100")
    assert shown.exit_code == 1
    assert "It does not fit" in shown.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "either --params N or --model FILE"),
        (("--params", "1B", "--model", "x.json"), "either --params N or --model FILE"),
        (("--params", "1B", "--gpu", "a1000"), "did you mean a100"),
        (("--params", "1B", "--nodes", "0"), "--nodes: got 0, expected at least 1"),
        (("--params", "1B", "--rank", "8"), "--rank: got 8, expected 0 to 7"),
        (("--params", "1B", "--mfu", "40"), "--mfu: got 40"),
        (("--params", "1B", "--tflops", "-1"), "expected a number above 0"),
    ],
)
def test_the_command_refuses_nonsense(config_file, words, message):
    shown = invoke("plan", config_file, *words)
    assert isinstance(shown.exception, PlanError)
    assert message in str(shown.exception)


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused_with_the_sums():
    config = {"train_batch_size": 100, "train_micro_batch_size_per_gpu": 1}
    with pytest.raises(ConfigError, match=r"got 100, not a multiple of .* use 96 or 112"):
        planning.make_plan(config, planning.model_of_size("1M"), planning.Cluster(2, 8, H100))
