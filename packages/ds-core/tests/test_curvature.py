"""Curvature helpers on quadratics and against the whole Hessian of a small network."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import ds_core
from ds_core import curvature
from ds_core.activation_checkpointing import checkpoint
from ds_core.curvature.observer import EigenvalueObserver
from ds_core.curvature.section import EigenvalueSection
from ds_core.errors import ConfigError, DsError
from ds_core.testing import run_ranks

EIGENVALUES = (-7.0, -1.0, 0.0, 0.5, 2.0, 5.0)


def quadratic(values=EIGENVALUES, seed=0):
    """x' A x / 2 with those eigenvalues, as the sum over two parameters of one vector."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    )
    matrix = rotation @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ rotation.T
    first = nn.Parameter(torch.ones(2, dtype=torch.float64))
    second = nn.Parameter(torch.ones(len(values) - 2, dtype=torch.float64))
    x = torch.cat([first, second])
    return curvature.Hessian(x @ matrix @ x / 2, [first, second]), matrix


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        for block in self.blocks:
            x = self.dropout(block(x))
        return x.square().mean()


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def whole_hessian(model, x, prefix=""):
    """Of the parameters whose names begin so, by torch.func."""
    names = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    params = dict(model.named_parameters())

    def loss(chosen):
        return functional_call(model, {**params, **chosen}, (x,))

    # Not torch.func.hessian: its forward mode warns of torch.jit.
    blocks = jacrev(jacrev(loss))({name: params[name] for name in names})
    sizes = {name: params[name].numel() for name in names}
    rows = [
        torch.cat([blocks[a][b].reshape(sizes[a], sizes[b]) for b in names], dim=1) for a in names
    ]
    return torch.cat(rows).detach()


def test_products_with_a_quadratic_are_those_with_its_matrix():
    h, matrix = quadratic()
    vector = torch.randn(6, dtype=torch.float64)

    assert h.size == 6
    torch.testing.assert_close(h.product(vector), matrix @ vector)


def test_the_top_eigenvalue_is_largest_in_magnitude_and_signed():
    h, matrix = quadratic()

    found = curvature.top_eigenvalue(h, max_iter=200, tol=1e-12)

    assert found.converged
    assert found.value == pytest.approx(-7.0, rel=1e-6)
    torch.testing.assert_close(matrix @ found.vector, -7.0 * found.vector, atol=1e-3, rtol=0)


def test_iterations_end_where_they_shall():
    h, _ = quadratic((1.0, 0.99, 0.98))

    assert curvature.top_eigenvalue(h, max_iter=3, tol=1e-15).iterations == 3
    assert not curvature.top_eigenvalue(h, max_iter=3, tol=1e-15).converged
    assert curvature.top_eigenvalue(h, tol=0.1).converged


def test_a_linear_loss_is_flat():
    weight = nn.Parameter(torch.ones(3))
    h = curvature.Hessian(weight.sum(), [weight])

    assert curvature.top_eigenvalue(h).value == 0.0
    assert curvature.trace(h).value == 0.0


def test_the_spectrum_of_a_quadratic_is_found_whole():
    h, _ = quadratic()

    found = curvature.spectrum(h, steps=10)

    assert found.values == pytest.approx(EIGENVALUES, abs=1e-6)
    assert sum(found.weights) == pytest.approx(1.0)
    assert (found.lowest, found.highest) == pytest.approx((-7.0, 5.0))


def test_trace_and_diagonal_are_exact_where_the_hessian_is_diagonal():
    weight = nn.Parameter(torch.arange(1.0, 5.0))
    h = curvature.Hessian((weight**3).sum(), [weight])

    assert curvature.trace(h, samples=1).value == pytest.approx(6 * 10)
    torch.testing.assert_close(curvature.diagonal(h, samples=1), 6 * weight.detach())


def test_estimates_lie_within_their_standard_error():
    h, matrix = quadratic()

    found = curvature.trace(h, samples=400)

    assert abs(found.value - float(matrix.trace())) < 4 * found.standard_error
    assert found.standard_error < 1.0


@pytest.mark.parametrize("prefix", ["", "blocks.1."], ids=["model", "block"])
def test_a_network_agrees_with_its_whole_hessian(prefix):
    model, x = net(torch.float64).eval(), torch.randn(5, 4, dtype=torch.float64)
    exact = whole_hessian(model, x, prefix)
    values = torch.linalg.eigvalsh(exact)
    chosen = [p for name, p in model.named_parameters() if name.startswith(prefix)]

    h = curvature.Hessian(model(x), chosen)

    vector = torch.randn(h.size, dtype=torch.float64)
    torch.testing.assert_close(h.product(vector), exact @ vector)
    top = curvature.top_eigenvalue(h, max_iter=500, tol=1e-9)
    assert top.value == pytest.approx(float(values[values.abs().argmax()]), rel=1e-4)
    ends = curvature.spectrum(h, steps=40)
    assert (ends.lowest, ends.highest) == pytest.approx((values[0].item(), values[-1].item()))


def test_checkpointed_attention_is_differentiated_twice():
    q = nn.Parameter(torch.randn(1, 2, 4, 8))

    def loss():
        attend = nn.functional.scaled_dot_product_attention
        return checkpoint(lambda q: attend(q, q, q), q).square().sum()

    with curvature.twice_differentiable():
        h = curvature.Hessian(loss(), [q])

    assert torch.isfinite(h.product(torch.ones(h.size))).all()


def test_what_has_no_second_derivative_says_what_to_do():
    q = nn.Parameter(torch.randn(1, 2, 4, 8))
    fused = nn.functional.scaled_dot_product_attention(q, q, q).square().sum()

    with pytest.raises(DsError, match="twice_differentiable"):
        curvature.Hessian(fused, [q]).product(torch.ones(64))
    with pytest.raises(DsError, match="none of the parameters"):
        curvature.Hessian(fused, [])
    with pytest.raises(DsError, match=r"got shape \[2\]"):
        curvature.Hessian(q.flatten()[:2], [q])
    with pytest.raises(DsError, match="samples: got 0"):
        curvature.trace(quadratic()[0], samples=0)
    with pytest.raises(DsError, match="steps: got 0"):
        curvature.spectrum(quadratic()[0], steps=0)


CONFIG = {
    "train_micro_batch_size_per_gpu": 5,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
}


def train(observers=(), steps=4, **config):
    engine = ds_core.initialize(net(), {**CONFIG, **config}, observers=observers)
    rank = engine.mesh.group("dp").rank
    torch.manual_seed(rank)  # dropout differs
    losses, batches = [], []
    for number in range(2 * steps):
        generator = torch.Generator().manual_seed(100 * number + rank)
        batches.append(torch.randn(5, 4, generator=generator))
        engine.backward(loss := engine(batches[-1]))
        engine.step()
        losses.append(loss.item())
    return engine, losses, batches[-1]


def test_the_observer_measures_each_block_and_leaves_training_alone():
    section = EigenvalueSection(enabled=True, gas_boundary_resolution=2, max_iter=500, tol=1e-7)
    observer = EigenvalueObserver(section)

    engine, losses, batch = train((observer,))

    assert losses == train()[1]
    assert engine.module.training
    engine.close()
    exact = whole_hessian(engine.module.eval(), batch, "blocks.1.")
    values = torch.linalg.eigvalsh(exact)
    top = float(values[values.abs().argmax()])
    assert observer.values["blocks.1"] == pytest.approx(top, rel=1e-3)
    assert max(observer.ratios.values()) == 1.0


def test_the_section_writes_values_to_the_metrics(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    section = {"enabled": True, "verbose": True, "gas_boundary_resolution": 2}

    with caplog.at_level(logging.INFO):
        engine, _, _ = train(eigenvalue=section, metrics={"jsonl": str(path)})
        engine.close()

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = [line for line in lines if "eigenvalue/blocks.0" in line]
    assert [line["step"] for line in found] == [2, 4]
    assert "top eigenvalue of blocks.1" in caplog.text


def measure_at_ranks():
    observer = EigenvalueObserver(EigenvalueSection(enabled=True, max_iter=300, tol=1e-7))
    engine, _, batch = train((observer,), steps=1)
    engine.close()
    exact = whole_hessian(engine.module.eval(), batch, "blocks.0.")
    return observer.values["blocks.0"], exact


def test_ranks_measure_the_mean_of_their_losses():
    (first, h0), (second, h1) = run_ranks(2, measure_at_ranks)

    values = torch.linalg.eigvalsh((h0 + h1) / 2)
    assert first == second
    assert first == pytest.approx(float(values[values.abs().argmax()]), rel=1e-3)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        pytest.param({"layer_name": "encoder"}, "got 'encoder', which is no module", id="name"),
        pytest.param({"layer_name": "dropout"}, "got 'dropout', which is no module", id="leaf"),
        pytest.param({"tol": 0}, "eigenvalue.tol", id="tolerance"),
    ],
)
def test_blocks_that_are_not_there_are_a_config_error(section, message):
    with pytest.raises(ConfigError, match=message):
        train(eigenvalue={"enabled": True, **section})


def test_layer_name_and_number_choose_blocks():
    observer = EigenvalueObserver(EigenvalueSection(enabled=True, layer_name="blocks", layer_num=1))

    train((observer,), steps=1)

    assert list(observer.values) == ["blocks.0"]


def test_a_model_without_a_loss_is_told_so():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    engine = ds_core.initialize(model, {**CONFIG, "eigenvalue": {"enabled": True}})

    for _ in range(2):
        engine.backward(engine(torch.randn(5, 2)).square().mean())
        if engine.is_boundary:
            with pytest.raises(DsError, match="eigenvalue: the model must return its loss"):
                engine.step()
        else:
            engine.step()
