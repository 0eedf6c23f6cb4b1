"""The FLOPS profiler against closed forms, torch's own counter, and runs without it."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ds_core
from ds_core.errors import ConfigError, DsError
from ds_core.profiling import FlopsProfiler, get_model_profile, profile_model
from ds_core.profiling.observer import FlopsObserver
from ds_core.profiling.section import FlopsProfilerSection

B, T, D, H, V = 2, 10, 24, 4, 50


class Attention(nn.Module):
    """Self-attention with `kv` heads of keys and values for H of queries."""

    def __init__(self, kv=H, causal=True):
        super().__init__()
        self.kv, self.causal = kv, causal
        self.q, self.out = nn.Linear(D, D), nn.Linear(D, D)
        self.k, self.v = (nn.Linear(D, kv * D // H) for _ in range(2))

    def forward(self, x):
        q, k, v = (
            proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for proj, heads in ((self.q, H), (self.k, self.kv), (self.v, self.kv))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.kv != H)
        return self.out(y.transpose(1, 2).flatten(2))


class Plain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(D, width), nn.Linear(width, D)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Gated(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate, self.up = nn.Linear(D, width), nn.Linear(D, width)
        self.down = nn.Linear(width, D)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        norm = nn.RMSNorm if kind == "llama" else nn.LayerNorm
        self.norm1, self.norm2 = norm(D), norm(D)
        self.attention = Attention(2 if kind == "llama" else H, causal=kind != "bert")
        self.mlp = Gated(64) if kind == "llama" else Plain(4 * D)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A GPT (tied), a BERT or a Llama, as far as their operations go."""

    def __init__(self, kind, layers=3, recomputes=False):
        super().__init__()
        self.recomputes = recomputes
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(layers))
        self.head = nn.Linear(D, V, bias=False)
        if kind == "gpt":
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


def tokens():
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))


def linear_and_attention(kind, layers=3):
    """Forward FLOPs of the linear layers and of attention, by hand."""
    kv = D * 2 // H if kind == "llama" else D
    mlp = 3 * D * 64 if kind == "llama" else 2 * D * 4 * D
    linear = layers * (2 * D * D + 2 * D * kv + mlp) + D * V
    return 2 * B * T * linear, layers * 2 * (2 * B * H * T * T * (D // H))


def watched(model, *args):
    with FlopsProfiler(model) as profiler:
        output = model(*args)
        (output if output.dim() == 0 else output.sum()).backward()
    return profiler.profile()


@pytest.mark.parametrize("kind", ["gpt", "bert", "llama"])
def test_transformers_equal_their_closed_forms(kind):
    model = Transformer(kind)
    linear, attention = linear_and_attention(kind)

    profile = watched(model, tokens())

    assert profile.forward_flops == linear + attention
    assert profile.macs == (linear + attention) // 2
    # The fused backward of attention computes the scores again: 5 products for 2.
    assert profile.backward_flops == 2 * linear + attention * 5 // 2
    assert profile.recompute_flops == 0
    assert profile.parameters == sum(p.numel() for p in model.parameters())
    assert profile.uncounted == {}


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_every_module_has_its_own_share_in_each_phase(kind):
    profile = watched(Transformer(kind), tokens())

    attention = 2 * (2 * B * H * T * T * (D // H))
    for layer in range(3):
        mlp = profile.find(f"blocks.{layer}.mlp.down")
        width = 64 if kind == "llama" else 4 * D
        assert (mlp.forward_flops, mlp.backward_flops) == (
            2 * B * T * D * width,
            4 * B * T * D * width,
        )
        whole = profile.find(f"blocks.{layer}.attention")
        parts = whole.children
        assert whole.forward_flops - sum(p.forward_flops for p in parts) == attention
        assert whole.backward_flops - sum(p.backward_flops for p in parts) == attention * 5 // 2
    assert profile.outside.flops == 0


def test_recomputation_is_counted_apart_and_where_it_happens():
    kept, again = (watched(Transformer("llama", recomputes=r), tokens()) for r in (False, True))

    assert again.forward_flops == kept.forward_flops
    assert again.backward_flops == kept.backward_flops
    # Torch stops a recomputation at the last tensor that is needed: not the last product.
    last = sum(again.find(f"blocks.{i}.mlp.down").forward_flops for i in range(3))
    blocks = again.find("blocks")
    assert again.recompute_flops == blocks.recompute_flops == blocks.forward_flops - last
    assert again.find("head").recompute_flops == 0
    assert blocks.children[0].calls == 1
    assert blocks.children[0].recompute_s > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_function_belongs_to_the_module_that_calls_it(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            return self.second(
                checkpoint(lambda y: (y @ y.T @ y).exp(), x, use_reentrant=reentrant)
            )

    profile = watched(Net(), torch.randn(4, 4))

    product = 2 * 4 * 4 * 4
    assert profile.forward_flops == 4 * product
    assert profile.recompute_flops == 2 * product
    assert profile.backward_flops == 4 * product + 3 * product
    assert profile.model.backward_flops == profile.backward_flops
    assert profile.find("first").backward_flops == product  # its input needs no gradient


CONVOLUTIONS = [
    pytest.param(nn.Conv2d(4, 6, 3), (2, 4, 9, 8), id="plain"),
    pytest.param(nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8), id="strided"),
    pytest.param(nn.Conv2d(4, 6, 3, dilation=2, bias=False), (2, 4, 9, 8), id="dilated"),
    pytest.param(nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 8), id="grouped"),
    pytest.param(nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 9, 8), id="depthwise"),
    pytest.param(nn.Conv1d(4, 6, 5), (2, 4, 9), id="1d"),
    pytest.param(nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6), id="3d"),
    pytest.param(nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 6), id="transposed"),
    pytest.param(nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 6), id="transposed-grouped"),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS)
def test_convolutions_equal_their_closed_forms(layer, shape):
    inputs = torch.randn(shape, requires_grad=True)
    points = layer(inputs) if not layer.transposed else inputs
    forward = 2 * shape[0] * math.prod(points.shape[2:]) * layer.weight.numel()

    profile = watched(layer, inputs)

    assert profile.forward_flops == forward
    assert profile.backward_flops == 2 * forward
    if layer.groups == 1:
        with FlopCounterMode(display=False) as torchs:
            layer(inputs).sum().backward()
        assert torchs.get_total_flops() == profile.flops


def test_a_conv_net_equals_torchs_counter_and_its_first_layer_has_one_gradient():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    images = torch.randn(4, 3, 12, 12)

    profile = watched(model, images)
    with FlopCounterMode(display=False) as torchs:
        model(images).sum().backward()

    assert profile.flops == torchs.get_total_flops()
    first = profile.find("0")
    assert first.forward_flops == first.backward_flops == 2 * 4 * 12 * 12 * 3 * 8 * 9
    assert profile.find("1").flops == 0
    assert profile.find("1").elementwise_flops > 0


def test_a_module_used_twice_counts_twice_and_tied_parameters_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.alias = self.a

        def forward(self, x):
            return self.b(self.alias(self.a(x)))

    profile = watched(Twice(), torch.randn(3, 4))

    one = 2 * 3 * 4 * 4
    assert [child.name for child in profile.model.children] == ["a", "b"]
    assert (profile.find("a").calls, profile.find("a").forward_flops) == (2, 2 * one)
    assert profile.forward_flops == 3 * one
    assert profile.backward_flops == 5 * one
    assert profile.parameters == 16 + 4 + 4


def test_results_are_those_without_a_profiler_bit_by_bit():
    def run(profiled):
        torch.manual_seed(0)
        model = nn.Sequential(Transformer("llama", recomputes=True))
        model.append(nn.Dropout())
        profiler = FlopsProfiler(model)
        if profiled:
            profiler.start()
        loss = model(tokens())
        loss.backward()
        profiler.stop()
        state = [p.grad for p in model.parameters()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        return [loss.detach(), torch.rand(3), *state]

    for plain, profiled in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, profiled)


def test_work_outside_of_the_model_is_told_apart():
    model = nn.Linear(4, 4)
    weight = torch.randn(4, 4, requires_grad=True)

    with FlopsProfiler(model) as profiler:
        (model(torch.randn(2, 4)) @ weight).sum().backward()
    profile = profiler.profile()

    one = 2 * 2 * 4 * 4
    assert profile.outside.forward_flops == one
    assert profile.outside.backward_flops == 2 * one
    assert profile.model.flops == 2 * one
    assert "(outside the model)" in profile.text()


def test_a_backward_that_is_differentiated_is_no_recomputation():
    model = nn.Linear(4, 1)
    inputs = torch.randn(2, 4, requires_grad=True)

    with FlopsProfiler(model) as profiler:
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
    profile = profiler.profile()

    assert profile.recompute_flops == 0
    assert profile.backward_flops > 2 * profile.forward_flops


def test_inference_mode_and_fused_layers_are_counted():
    layer = nn.TransformerEncoderLayer(D, H, 64, batch_first=True).eval()
    x = torch.randn(B, T, D)
    attention = 2 * (2 * B * H * T * T * (D // H))
    expected = 2 * B * T * (4 * D * D + 2 * D * 64) + attention

    with torch.inference_mode(), FlopsProfiler(layer) as fused:
        layer(x)
    layer.train()
    with FlopsProfiler(layer) as parts:
        layer(x)
    with torch.inference_mode(), FlopsProfiler(nn.Linear(D, 5)) as linear:
        linear._model(x)

    assert fused.profile().forward_flops == parts.profile().forward_flops == expected
    assert linear.profile().forward_flops == 2 * B * T * D * 5


def test_recurrent_layers_are_counted():
    layer = nn.LSTM(3, 5, num_layers=2, bidirectional=True)

    profile = watched(_First(layer), torch.randn(7, 2, 3))

    weights = 2 * (20 * 3 + 20 * 5) + 2 * (20 * 10 + 20 * 5)
    assert profile.forward_flops == 2 * 7 * 2 * weights
    assert profile.backward_flops == 2 * profile.forward_flops


class _First(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


def test_operations_of_other_libraries_without_a_formula_are_named():
    @torch.library.custom_op("ds_test_profiling::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    class Net(nn.Module):
        def forward(self, x):
            return twice(x)

    with FlopsProfiler(Net()) as profiler:
        profiler._model(torch.ones(2))
    profile = profiler.profile()

    assert profile.uncounted == {"ds_test_profiling::twice": 1}
    assert "ds_test_profiling::twice, 1 calls" in profile.text()


def test_an_exception_in_a_forward_leaves_the_profiler_usable():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x, fail):
            x = self.inner(x)
            if fail:
                raise RuntimeError("no")
            return x

    model = Picky()
    profiler = FlopsProfiler(model)
    with pytest.raises(RuntimeError, match="no"), profiler:
        model(torch.ones(1, 2), True)
    with profiler:
        model(torch.ones(1, 2), False)

    assert profiler.profile().find("inner").calls == 2
    assert profiler.profile().outside.flops == 0


def test_compiled_modules_are_counted():
    model = torch.compile(nn.Linear(4, 4), backend="eager")
    model(torch.ones(2, 4))

    with FlopsProfiler(model) as profiler:
        model(torch.ones(2, 4))

    assert profiler.profile().forward_flops == 2 * 2 * 4 * 4


def test_a_profile_is_data_and_a_table():
    profile = watched(Transformer("gpt"), tokens())

    data = json.loads(json.dumps(profile.to_dict()))
    text = profile.text(module_depth=1, top_modules=2)

    assert data["model"]["children"][1]["name"] == "blocks"
    assert data["model"]["forward_flops"] == profile.forward_flops
    lines = [line.split() for line in text.splitlines()]
    assert ["parameters", *f"{profile.parameters / 1e3:.2f} k".split()] in lines
    assert any(line[:2] == ["blocks", "ModuleList"] for line in lines)
    assert not any("mlp" in line for line in lines)
    assert "mlp" in profile.text()
    assert "mlp" not in profile.text(detailed=False)
    with pytest.raises(KeyError, match="no module is called 'nonsense'"):
        profile.find("nonsense")


def test_model_profile_gives_flops_macs_and_params():
    model = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5)).train()
    before = torch.get_rng_state()

    exact = get_model_profile(model, (3, 8), print_profile=False, as_string=False)
    told = get_model_profile(model, args=[torch.ones(3, 8)], print_profile=False)

    assert exact == (2 * 3 * 8 * 4, 3 * 8 * 4, 36)
    assert told == ("192 FLOPs", "96 MACs", "36")
    assert model.training
    assert model[1].training
    assert torch.equal(before, torch.get_rng_state())


def test_model_profile_writes_its_report(tmp_path, capsys):
    model = nn.Linear(8, 4)

    get_model_profile(model, (3, 8), output_file=tmp_path / "deep" / "report.txt")
    get_model_profile(model, kwargs={"input": torch.ones(3, 8)}, warm_up=0)

    written = (tmp_path / "deep" / "report.txt").read_text()
    assert "96 MACs" in written
    assert "96 MACs" in capsys.readouterr().out


def test_model_profile_leaves_out_ignored_classes_and_profiles_generate():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept, self.ignored = nn.Linear(4, 4, bias=False), nn.Sequential(nn.Linear(4, 4))

        def forward(self, x):
            return self.ignored(self.kept(x))

        def generate(self, x):
            return self(self(x))

    settings = {"print_profile": False, "as_string": False, "ignore_modules": [nn.Sequential]}

    assert get_model_profile(Net(), (2, 4), **settings) == (64, 32, 16)
    assert get_model_profile(Net(), (2, 4), mode="generate", **settings) == (128, 64, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({}, "nothing to call the model with", id="no-input"),
        pytest.param({"input_shape": (1, 2), "args": [1]}, "and arguments", id="both"),
        pytest.param({"input_shape": (1, 2), "mode": "train"}, "expected one of", id="mode"),
        pytest.param({"input_shape": (1, 2), "mode": "generate"}, "no method generate", id="none"),
        pytest.param(
            {"input_shape": (1, 2), "ignore_modules": [nn.Linear]}, "leave it out", id="itself"
        ),
    ],
)
def test_what_cannot_be_profiled_says_why(settings, message):
    with pytest.raises(DsError, match=message):
        profile_model(nn.Linear(2, 2), **settings)


def train(steps=3, **config):
    torch.manual_seed(0)
    engine = ds_core.initialize(
        Transformer("gpt"),
        {
            "train_micro_batch_size_per_gpu": B,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            **config,
        },
    )
    losses = []
    for _ in range(2 * steps):
        loss = engine(tokens())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.close()
    return losses


def test_a_training_step_is_profiled_and_the_next_one_timed(tmp_path):
    path = tmp_path / "flops.txt"
    section = {"enabled": True, "profile_step": 1, "output_file": str(path)}

    assert train(flops_profiler=section) == train()

    text = path.read_text()
    linear, attention = linear_and_attention("gpt")
    assert "step 1 on rank 0: 2 micro-batches of 2 samples" in text
    assert "in the step after it, without the profiler" in text
    assert f"{2 * (linear + attention) / 1e6:.2f} M FLOPs" in text
    assert "FLOP/s" in text


def test_a_run_that_ends_with_the_profiled_step_still_reports(tmp_path):
    path = tmp_path / "flops.txt"

    train(2, flops_profiler={"enabled": True, "output_file": str(path)})

    assert "with the profiler's own cost" in path.read_text()


def test_plain_backward_and_the_terminal_are_served_too():
    stream = io.StringIO()
    observer = FlopsObserver(FlopsProfilerSection(profile_step=0, detailed=False), stream=stream)
    model = nn.Linear(4, 1)
    engine = ds_core.initialize(
        model,
        {"train_micro_batch_size_per_gpu": 2},
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        observers=(observer,),
    )
    for _ in range(3):
        engine(torch.randn(2, 4)).mean().backward()
        engine.step()

    assert observer.profile.forward_flops == 2 * 2 * 4
    assert observer.profile.backward_flops == 2 * 2 * 4  # of the weight; the input needs none
    assert stream.getvalue().count("FLOPS profile of optimizer step 0") == 1


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(DsError, match=r"flops_profiler.output_file: cannot write"):
        train(2, flops_profiler={"enabled": True, "output_file": str(tmp_path / "file" / "x")})


def test_the_section_is_checked():
    with pytest.raises(ConfigError, match=r"flops_profiler.module_depth"):
        train(flops_profiler={"enabled": True, "module_depth": -2})
