"""fake_quantize: every implementation against the reference, and what training relies on."""

from __future__ import annotations

import pytest
import torch

import ds_ops
from ds_core.errors import OpError
from ds_core.testing.contracts import OpContract


class TestFakeQuantize(OpContract):
    op = "fake_quantize"


class TestFakeQuantizeSigns(OpContract):
    op = "fake_quantize_signs"
    compiled = False


def _numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- What comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "name"), [(8, "int8"), (4, "int4")])
@pytest.mark.parametrize("seed", [None, 11])
def test_it_is_what_quantize_and_dequantize_make(
    bits: int, name: str, symmetric: bool, dtype: torch.dtype, seed: int | None
) -> None:
    x = _numbers(6, 128, dtype=dtype)
    rounding = "nearest" if seed is None else "stochastic"
    q = ds_ops.quantize(x, name, block=64, symmetric=symmetric, rounding=rounding, seed=seed)
    scheme = "symmetric" if symmetric else "asymmetric"
    found = ds_ops.fake_quantize(x, bits, groups=12, scheme=scheme, rounding=rounding, seed=seed)
    assert found.dtype == dtype
    assert torch.equal(found, ds_ops.dequantize(q))


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 17))
def test_numbers_are_within_half_a_step(bits: int, scheme: str) -> None:
    x = _numbers(4, 512)
    found = ds_ops.fake_quantize(x, bits, groups=4, scheme=scheme)
    if scheme == "symmetric":
        step = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    else:
        step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / (2**bits - 1)
    assert ((found - x).abs() <= step * 0.5001 + 1e-6).all()
    assert all(len(row.unique()) <= 2**bits for row in found)
    # The ends of a range stay where they are.
    at = x.abs().argmax(1, keepdim=True)
    assert torch.allclose(found.gather(1, at), x.gather(1, at), rtol=1e-6)


def test_groups_have_scales_of_their_own() -> None:
    x = torch.tensor([[1.0, 0.3, 100.0, 30.0]])
    assert ds_ops.fake_quantize(x, 2).tolist() == [[0.0, 0.0, 100.0, 0.0]]
    assert ds_ops.fake_quantize(x, 2, groups=2).tolist() == [[1.0, 0.0, 100.0, 0.0]]


def test_limits_cut_off() -> None:
    x = torch.tensor([-9.0, -1.0, -0.2, 0.6, 1.0, 7.0])
    limits = torch.tensor([-1.0, 1.0])
    found = ds_ops.fake_quantize(x, 2, limits=limits)
    assert found.tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0, 1.0]
    shifted = torch.tensor([0.0, 3.0])
    found = ds_ops.fake_quantize(x, 2, scheme="asymmetric", limits=shifted)
    assert found.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 3.0]
    each = torch.tensor([[-1.0, 1.0], [-2.0, 7.0]])
    assert ds_ops.fake_quantize(x, 2, groups=2, limits=each).tolist() == [-1, -1, 0, 0, 0, 7]


def test_ternary_and_binary_are_as_their_formulas_say() -> None:
    x = torch.tensor([[4.0, -2.0, 0.5, -0.1], [0.0, 0.0, 0.0, 0.0]])
    ternary = ds_ops.fake_quantize(x, 2, groups=2, scheme="ternary")
    assert ternary.tolist() == [[3.0, -3.0, 0.0, 0.0], [0.0] * 4]
    binary = ds_ops.fake_quantize(x, 1, groups=2, scheme="binary")
    assert torch.allclose(binary[0], torch.tensor([1.65, -1.65, 1.65, -1.65]))
    assert binary[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric", "ternary", "binary"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_overflow_is_never_hidden(scheme: str, bad: float) -> None:
    x = _numbers(3, 64)
    x[1, 5] = bad
    bits = {"ternary": 2, "binary": 1}.get(scheme, 8)
    found = ds_ops.fake_quantize(x, bits, groups=3, scheme=scheme)
    assert found.isnan().all(1).tolist() == [False, True, False]
    assert found[::2].isfinite().all()


def test_with_limits_only_a_nan_is_one() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.2])
    found = ds_ops.fake_quantize(x, 8, limits=torch.tensor([-1.0, 1.0]))
    assert found[0].isnan()
    assert found[1:3].tolist() == [1.0, -1.0]
    for wrong in ([1.0, -1.0], [0.0, float("inf")], [float("nan"), 1.0]):
        assert ds_ops.fake_quantize(x, 8, limits=torch.tensor(wrong)).isnan().all()


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric", "ternary", "binary"])
def test_the_gradient_passes_straight(scheme: str) -> None:
    x = _numbers(4, 32).requires_grad_()
    grad = _numbers(4, 32, seed=1)
    bits = {"ternary": 2, "binary": 1}.get(scheme, 3)
    ds_ops.fake_quantize(x, bits, groups=4, scheme=scheme).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_what_limits_cut_off_has_no_gradient(scheme: str) -> None:
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 1.0, 2.0, 2.1], requires_grad=True)
    limits = torch.tensor([-1.0, 2.0], requires_grad=True)
    ds_ops.fake_quantize(x, 4, scheme=scheme, limits=limits).sum().backward()
    assert x.grad is not None
    below = 1.0 if scheme == "symmetric" else 0.0  # its range is -2 to 2
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    assert limits.grad is None
    y = torch.tensor([-1.5], requires_grad=True)
    ds_ops.fake_quantize(y, 4, scheme=scheme, limits=limits).backward()
    assert y.grad is not None
    assert y.grad.item() == below


def test_weights_learn_through_it() -> None:
    x, true = _numbers(256, 16), _numbers(16, 4, seed=1)
    weight = torch.zeros(16, 4, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (x @ ds_ops.fake_quantize(weight, 6, groups=16) - x @ true).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 100


# --- Stochastic rounding --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_stochastic_rounding_is_unbiased(bits: int, scheme: str) -> None:
    x = _numbers(1, 64).repeat(1 << 13, 1)
    found = ds_ops.fake_quantize(
        x, bits, groups=len(x), scheme=scheme, rounding="stochastic", seed=5
    ).double()
    sigma = found.std(0) / len(found) ** 0.5
    distance = (found.mean(0) - x[0].double()).abs()
    assert (distance <= 4 * sigma + 1e-6).all()
    # All together, but for the ends of the range, which are no draws.
    drawn = sigma > 1e-6
    squares = (distance[drawn] / sigma[drawn]).square()
    assert len(squares) >= 60
    assert abs(float(squares.mean()) - 1) < 4 * (2 / len(squares)) ** 0.5


def test_seeds_are_reproducible() -> None:
    x = _numbers(4, 64)

    def drawn(seed: int | None) -> torch.Tensor:
        return ds_ops.fake_quantize(x, 3, rounding="stochastic", seed=seed)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    torch.manual_seed(3)
    first = drawn(None)
    torch.manual_seed(3)
    assert torch.equal(first, drawn(None))


# --- Use ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_it_compiles_into_one_graph() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return ds_ops.fake_quantize(x, 4, groups=4).square().sum()

    x, y = (_numbers(4, 64).requires_grad_() for _ in range(2))
    loss(x).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(y).backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)


def test_words_that_mean_nothing_are_refused() -> None:
    x = _numbers(2, 64)
    limits = torch.tensor([-1.0, 1.0])
    for message, given in (
        ("scheme: got fp8, expected one of symmetric", {"scheme": "fp8"}),
        ("rounding: got up", {"rounding": "up"}),
        ("seed: got 3, expected None", {"seed": 3}),
        ('bits: got 8, expected 2 for scheme="ternary"', {"scheme": "ternary"}),
        ('bits: got 2, expected 1 for scheme="binary"', {"scheme": "binary", "bits": 2}),
        ("limits: got a tensor", {"scheme": "binary", "bits": 1, "limits": limits}),
        ("rounding: got stochastic", {"scheme": "ternary", "bits": 2, "rounding": "stochastic"}),
    ):
        with pytest.raises(OpError, match=message):
            ds_ops.fake_quantize(x, **given)
