"""Lion, LAMB and Muon against their formulas, element by element."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ds_core.errors import OptimizerError
from ds_core.optim import Lamb, Lion, Muon


def trained(optimizer_of, steps=4):
    """Values before, gradients given, and values after some steps, in fp64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,)]
    params = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in shapes
    ]
    before = [param.detach().clone() for param in params]
    gradients = [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for _ in range(steps)
    ]
    optimizer = optimizer_of(params)
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        optimizer.step()
    return before, gradients, [param.detach() for param in params]


def test_lion_equals_its_formula():
    lr, (b1, b2), decay = 0.01, (0.9, 0.95), 0.1
    before, gradients, after = trained(
        lambda params: Lion(params, lr=lr, betas=(b1, b2), weight_decay=decay)
    )
    for index, p in enumerate(before):
        m = torch.zeros_like(p)
        for step in gradients:
            g = step[index]
            p = p * (1 - lr * decay) - lr * (b1 * m + (1 - b1) * g).sign()
            m = b2 * m + (1 - b2) * g
        assert torch.allclose(p, after[index], rtol=1e-12)


@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "as-is"])
def test_lamb_equals_its_formula(correct):
    lr, (b1, b2), eps, decay = 0.02, (0.9, 0.99), 1e-6, 0.1
    before, gradients, after = trained(
        lambda params: Lamb(
            params, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay, bias_correction=correct,
            max_coeff=0.6, min_coeff=0.2,
        )
    )  # fmt: skip
    for index, p in enumerate(before):
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for t, step in enumerate(gradients, 1):
            g = step[index]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            first, second = (1 - b1**t, 1 - b2**t) if correct else (1, 1)
            u = (m / first) / ((v / second).sqrt() + eps) + decay * p
            p = p - lr * (p.norm() / u.norm()).clamp(0.2, 0.6) * u
        assert torch.allclose(p, after[index], rtol=1e-7)


def test_lamb_takes_a_plain_step_from_zero():
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    Lamb([param], lr=0.5).step()
    assert torch.allclose(param, torch.full((3,), -0.5))


def test_muon_updates_hidden_matrices_and_adam_the_rest():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "hidden": nn.Linear(3, 3)})
    twin = nn.ModuleDict({"embed": nn.Embedding(4, 3), "hidden": nn.Linear(3, 3)})
    twin.load_state_dict(model.state_dict())
    optimizer = Muon(model.named_parameters(), lr=0.1, adam_lr=0.01, weight_decay=0.1)
    expected = [
        torch.optim.Muon([twin.hidden.weight], lr=0.1, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW([twin.embed.weight, twin.hidden.bias], lr=0.01, weight_decay=0.1),
    ]
    for _ in range(3):
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            param.grad = torch.randn_like(param)
            other.grad = param.grad.clone()
        for each in (optimizer, *expected):
            each.step()
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, other)


def test_muon_goes_on_from_its_saved_state():
    torch.manual_seed(0)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizers = [Muon(model.named_parameters(), lr=0.1) for model in (first, second)]
    first.weight.grad, first.bias.grad = torch.randn(3, 3), torch.randn(3)
    optimizers[0].step()
    second.load_state_dict(first.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip((first, second), optimizers, strict=True):
        model.weight.grad, model.bias.grad = torch.ones(3, 3), torch.ones(3)
        optimizer.step()
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_a_parameter_says_itself_whether_muon_takes_it():
    model = nn.Linear(3, 3)
    model.weight.use_muon = False
    optimizer = Muon(model.named_parameters())
    assert len(optimizer.param_groups) == 1
    assert "betas" in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: Lion(p, betas=(1.0, 0.9)), "betas in"),
        (lambda p: Lamb(p, lr=-1), "none below 0"),
        (lambda p: Lamb(p, min_coeff=2.0, max_coeff=1.0), "min_coeff <= max_coeff"),
    ],
    ids=["lion", "lamb", "lamb-bounds"],
)
def test_arguments_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build([nn.Parameter(torch.ones(1))])


def test_muon_without_parameters_is_refused():
    with pytest.raises(OptimizerError, match="Muon: params: got none"):
        Muon([])
