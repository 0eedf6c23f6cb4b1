"""TransformerLayer against a BERT layer of plain torch, and what its options keep in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ds_core import ops
from ds_core.errors import ConfigError, OpError
from ds_ops import TransformerLayer, TransformerLayerConfig

SAVING = ("normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint")


def config(**changes: Any) -> TransformerLayerConfig:
    given: dict[str, Any] = {
        "hidden_size": 24, "heads": 3, "attn_dropout_ratio": 0.0, "hidden_dropout_ratio": 0.0,
        "num_hidden_layers": 2, "initializer_range": 0.2,
    }  # fmt: skip
    return TransformerLayerConfig(**given | changes)


@pytest.fixture
def exact() -> Iterator[None]:
    """Ops by their references, which compute float64 in float64."""
    with ops.use(layer_norm="reference", bias_activation="reference"):
        yield


def layer(dtype: torch.dtype = torch.float32, **changes: Any) -> TransformerLayer:
    torch.manual_seed(0)
    made = TransformerLayer(config(**changes)).to(dtype)
    for p in made.parameters():  # biases and norms that make a difference
        p.data += 0.1 * torch.randn_like(p)
    return made


def bert(
    p: dict[str, torch.Tensor], x: torch.Tensor, mask: torch.Tensor | None, heads: int, pre: bool
) -> torch.Tensor:
    """A layer of BERT, one step after the other."""
    batch, length, width = x.shape

    def norm(v: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(v, (width,), p[f"{name}w"], p[f"{name}b"], 1e-12)

    inside = norm(x, "norm_") if pre else x
    q, k, v = (
        (inside @ w.t() + b).view(batch, length, heads, -1).transpose(1, 2)
        for w, b in zip(p["attn_qkvw"].chunk(3), p["attn_qkvb"].chunk(3), strict=True)
    )
    scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
    if mask is not None:
        scores = scores + mask
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
    x = x + mixed @ p["attn_ow"].t() + p["attn_ob"]
    inside = norm(x, "attn_n")
    x = x if pre else inside
    inter = F.gelu(inside @ p["inter_w"].t() + p["inter_b"], approximate="tanh")
    x = x + inter @ p["output_w"].t() + p["output_b"]
    return x if pre else norm(x, "norm_")


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.zeros(2, 1, 1, 7, dtype=dtype)
    mask[1, ..., 4:] = -10000.0
    return torch.randn(2, 7, 24, dtype=dtype, requires_grad=True), mask


def gradients(output: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    seed = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return list(torch.autograd.grad((output * seed).sum(), leaves))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize("options", [(), *((o,) for o in SAVING), SAVING])
def test_it_equals_plain_torch(options: tuple[str, ...], pre: bool, masked: bool) -> None:
    made = layer(torch.float64, pre_layer_norm=pre, **dict.fromkeys(options, True))
    x, mask = inputs(torch.float64)
    given = mask if masked else None
    found = made(x, given)
    expected = bert(dict(made.named_parameters()), x, given, 3, pre)
    torch.testing.assert_close(found, expected)
    leaves = (x, *made.parameters())
    for mine, torchs in zip(gradients(found, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(mine, torchs)


@pytest.mark.parametrize("pre", [True, False])
def test_in_fp32_it_is_as_close_as_plain_torch(pre: bool) -> None:
    made = layer(torch.float32, pre_layer_norm=pre)
    x, mask = inputs(torch.float32)
    found = made(x, mask)
    expected = bert(dict(made.named_parameters()), x, mask, 3, pre)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    leaves = (x, *made.parameters())
    for mine, torchs in zip(gradients(found, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-3, atol=1e-4)


def test_a_bool_mask_hides_keys() -> None:
    made = layer()
    x, mask = inputs()
    torch.testing.assert_close(made(x, mask == 0), made(x, mask))


def kept(made: TransformerLayer, x: torch.Tensor) -> set[tuple[int, int]]:
    """Address and bytes of the activations that are kept between forward and backward."""
    mine = {p.data_ptr() for p in made.parameters()} | {x.data_ptr()}
    found: list[tuple[int, int]] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in mine:
            found.append((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = made(x)
    del y
    return set(found)


@pytest.mark.parametrize("pre", [True, False])
def test_each_option_keeps_less_memory(pre: bool) -> None:
    x = torch.randn(2, 16, 24, requires_grad=True)
    sizes = {}
    for options in ((), *((o,) for o in SAVING), SAVING):
        changes = {"attn_dropout_ratio": 0.1} | dict.fromkeys(options, True)
        made = layer(torch.float32, pre_layer_norm=pre, **changes)
        sizes[options] = sum(size for _, size in kept(made, x))
    rows = 2 * 16 * 4
    assert sizes[()] - sizes[("gelu_checkpoint",)] == rows * 96
    norms = 2 if pre else 1  # a result, and each row's mean and scale
    assert sizes[()] - sizes[("normalize_invertible",)] == norms * rows * (24 + 2)
    assert sizes[SAVING] < min(sizes[(o,)] for o in SAVING)


@pytest.mark.parametrize("options", [*((o,) for o in SAVING), SAVING])
def test_dropout_is_the_same_when_it_is_computed_again(options: tuple[str, ...]) -> None:
    found = []
    for chosen in ((), options):
        changes = {"attn_dropout_ratio": 0.3, "hidden_dropout_ratio": 0.2}
        made = layer(**changes | dict.fromkeys(chosen, True))
        x, mask = inputs()
        torch.manual_seed(5)
        y = made(x, mask)
        found.append([y.detach(), *gradients(y, x, *made.parameters())])
    for plain, saving in zip(*found, strict=True):
        torch.testing.assert_close(saving, plain)


def test_dropout_is_off_in_evaluation() -> None:
    made = layer(attn_dropout_ratio=0.5, hidden_dropout_ratio=0.5, training=False)
    x, mask = inputs()
    assert not made.training
    expected = bert(dict(made.named_parameters()), x, mask, 3, True)
    torch.testing.assert_close(made(x, mask), expected)
    made.train()
    assert not torch.equal(made(x, mask), made(x, mask))


def test_parameters_have_the_names_and_shapes_of_the_original() -> None:
    found = {name: tuple(p.shape) for name, p in layer(intermediate_size=40).named_parameters()}
    assert found == {
        "attn_qkvw": (72, 24), "attn_qkvb": (72,), "attn_ow": (24, 24), "attn_ob": (24,),
        "attn_nw": (24,), "attn_nb": (24,), "inter_w": (40, 24), "inter_b": (40,),
        "output_w": (24, 40), "output_b": (24,), "norm_w": (24,), "norm_b": (24,),
    }  # fmt: skip


def test_weights_start_as_the_config_says() -> None:
    torch.manual_seed(0)
    made = TransformerLayer(config(hidden_size=96, initializer_range=0.02, num_hidden_layers=8))
    for name, spread in (("attn_qkvw", 0.02), ("inter_w", 0.02), ("attn_ow", 0.005),
                         ("output_w", 0.005)):  # fmt: skip
        assert float(getattr(made, name).detach().std()) == pytest.approx(spread, rel=0.05), name
    assert not made.attn_qkvb.any()
    assert bool((made.norm_w == 1).all())
    made.init_transformer_weights()
    assert float(made.attn_ow.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_weights_may_be_given() -> None:
    torch.manual_seed(0)
    square, row = torch.randn(24, 24), torch.randn(24)
    weights = [square, square + 1, square + 2, square + 3, row, torch.randn(96, 24),
               torch.randn(24, 96), row + 1]  # fmt: skip
    biases = [row, row + 1, row + 2, row + 3, row + 4, torch.randn(96), row + 5, row + 6]
    made = TransformerLayer(config(), weights, biases)
    assert torch.equal(made.attn_qkvw, torch.cat(weights[:3]))
    assert torch.equal(made.attn_qkvb, torch.cat(biases[:3]))
    assert torch.equal(made.attn_nw, weights[4])
    assert torch.equal(made.output_w, weights[6])
    assert torch.equal(made.norm_b, biases[7])
    with pytest.raises(ConfigError, match="initial_weights: got 2, expected 8 tensors"):
        TransformerLayer(config(), weights[:2])


def test_a_tuple_is_returned_on_request() -> None:
    x, _ = inputs()
    (found,) = layer(return_tuple=True)(x)
    assert torch.equal(found, layer()(x))


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": -1}, {"heads": 5}, {"attn_dropout_ratio": 1.0}, {"initializer_range": -1},
     {"num_hidden_layers": -1}, {"layer_norm_eps": -1.0}],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_refused_by_name(changes: dict[str, Any]) -> None:
    name = "hidden_size" if "heads" in changes else next(iter(changes))
    with pytest.raises(ConfigError, match=f"TransformerLayerConfig: {name}: got"):
        TransformerLayer(config(**changes))


@pytest.mark.parametrize("name", ["head_mask", "past_key_value", "grads", "output_attentions"])
def test_what_it_does_not_have_is_refused(name: str) -> None:
    x, _ = inputs()
    made = layer()
    made(x, None, None, None, None, None, None, False, None)
    with pytest.raises(OpError, match=f"TransformerLayer: {name}: got"):
        made(x, **{name: True})


def test_a_config_is_read_from_json(tmp_path: Path) -> None:
    told = {"hidden_size": 32, "heads": 4, "pre_layer_norm": False}
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "layer.json").write_text(json.dumps(told), encoding=encoding)
        found = TransformerLayerConfig.from_json_file(tmp_path / "layer.json")
        assert (found.hidden_size, found.intermediate_size, found.heads) == (32, 128, 4)
        assert not found.pre_layer_norm
    with pytest.raises(ConfigError, match="there is no 'hidden'; there are"):
        TransformerLayerConfig.from_dict({"hidden": 3})


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
@pytest.mark.parametrize("options", [(), SAVING])
def test_it_compiles_into_one_graph(options: tuple[str, ...]) -> None:
    made = layer(torch.float32, **dict.fromkeys(options, True))
    x, mask = inputs(torch.float32)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x, mask), made(x, mask)
    torch.testing.assert_close(found, expected)
    for mine, plain in zip(gradients(found, x), gradients(expected, x), strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (
            torch.ones(7, 24),
            None,
            r"hidden_states: got shape \[7, 24\], expected \[batch, length, 24",
        ),
        (torch.ones(2, 7, 16), None, r"hidden_states: got shape \[2, 7, 16\]"),
        (
            torch.ones(2, 7, 24).half(),
            None,
            "hidden_states: got torch.float16, expected torch.float32",
        ),
        (torch.ones(2, 7, 24), torch.ones(2, 1, 1, 6), r"attention_mask: got shape \[2, 1, 1, 6\]"),
        (torch.ones(2, 7, 24), torch.ones(1, 2, 1, 1, 7), "attention_mask: got shape"),
        (torch.ones(2, 7, 24), torch.ones(2, 1, 1, 7).long(), "attention_mask: got torch.int64"),
        (None, None, "hidden_states: got None, expected a tensor"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: Any, mask: Any, message: str) -> None:
    with pytest.raises(OpError, match=f"TransformerLayer: {message}"):
        layer()(x, mask)


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("options", [(), ("normalize_invertible", "gelu_checkpoint")])
def test_autocast_narrows_products_alone(options: tuple[str, ...], pre: bool) -> None:
    made = layer(pre_layer_norm=pre, **dict.fromkeys(options, True))
    x, mask = inputs()
    expected = made(x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = made(x, mask)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)
    assert not torch.equal(found, expected)
    found.square().sum().backward()
    grads = [p.grad for p in made.parameters()]
    assert all(grad is not None and grad.dtype is torch.float32 for grad in grads)


def test_a_dict_is_no_config() -> None:
    with pytest.raises(ConfigError, match="config: got dict, expected a TransformerLayerConfig"):
        TransformerLayer({"hidden_size": 24})
