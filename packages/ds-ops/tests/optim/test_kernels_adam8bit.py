"""Adam with eight bits per state in C++: its codes, its rounding, and that it follows Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_core import ops
from ds_core.errors import DsError
from ds_core.ops.adam8bit_step import BLOCK, decoded, encoded

BF16, FP32 = torch.bfloat16, torch.float32
SIZES = (0, 1, 15, 16, 17, 255, 256, 257, 1003, 32767, 32768, 32769)


def _tensors(numel: int, dtype: torch.dtype = FP32, *, seed: int = 0) -> list[torch.Tensor]:
    """param, grad and a state in the middle of a training."""
    made = torch.Generator().manual_seed(seed + numel)
    param, grad, mean, root = (torch.randn(numel, generator=made) for _ in range(4))
    state = (*encoded(mean, signed=True), *encoded(root.square(), signed=False))
    return [param.to(dtype), grad.to(dtype), *state]


def _fresh(param: torch.Tensor) -> list[torch.Tensor]:
    blocks = -(-param.numel() // BLOCK)
    codes = torch.zeros(param.shape, dtype=torch.uint8)
    return [codes, torch.zeros(blocks), codes.clone(), torch.zeros(blocks)]


def _step(own: list[torch.Tensor], impl: str = "cpp", **given: Any) -> None:
    # In the order of the schema.
    values = {"copy": None, "scale": None, "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    values |= {"weight_decay": 0.01, "step": 3, "decoupled": True, "seed": None} | given
    ops.run("adam8bit_step_", *own, *values.values(), impl=impl)


def _moments(own: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return decoded(own[2], own[3], signed=True), decoded(own[4], own[5], signed=False)


def _off(
    ours: torch.Tensor, theirs: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far new parameters are apart, and may be: AVX-512 has a step to 2^-13 of itself."""
    change = (theirs.double() - before).abs()
    off = (ours.double() - theirs.double()).abs()
    return off, 1e-6 + 1e-6 * before.abs() + 2**-13 * change


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_it_is_the_reference(numel: int, seed: int | None, dtype: torch.dtype) -> None:
    ours, theirs = _tensors(numel, dtype), _tensors(numel, dtype)
    before = theirs[0].double()
    copies = [torch.zeros(numel, dtype=BF16) for _ in range(2)]
    for impl, own, copy in (("cpp", ours, copies[0]), ("reference", theirs, copies[1])):
        _step(own, impl, copy=copy, seed=seed, scale=torch.tensor(0.5))
    off, allowed = _off(ours[0], theirs[0], before)
    if dtype is BF16:  # or to the other of two neighbours, where that is near
        assert int((off > allowed).sum()) <= max(1, numel // 1000)
        allowed = 2**-7 * theirs[0].double().abs() + 1e-6
    assert bool((off <= allowed).all())
    for index in (3, 5):
        assert torch.allclose(ours[index], theirs[index], rtol=1e-6, atol=1e-6)
    assert torch.equal(copies[0], ours[0].to(BF16))
    for index in (2, 4):  # codes: a number beside a boundary may end on its other side
        differ = ours[index].int() - theirs[index].int()
        assert int((differ != 0).sum()) <= numel // 10_000
        assert not numel or int(differ.abs().max()) <= 1


def test_weight_decay_of_adam_goes_through_the_gradient() -> None:
    ours, theirs = _tensors(300), _tensors(300)
    before = ours[0].double()
    _step(ours, decoupled=False, weight_decay=0.1)
    _step(theirs, "reference", decoupled=False, weight_decay=0.1)
    off, allowed = _off(ours[0], theirs[0], before)
    assert bool((off <= allowed).all())


def test_the_first_step_from_nothing_is_adams() -> None:
    param, grad = _tensors(1003)[:2]
    wide = param.double().requires_grad_()
    wide.grad = grad.double()
    torch.optim.AdamW([wide], lr=1e-2, weight_decay=0.01).step()
    _step([param, grad, *_fresh(param)], step=1)
    assert float((param.double() - wide.detach()).norm() / wide.detach().norm()) <= 1e-6


def test_stored_moments_are_within_a_step_of_the_code() -> None:
    own = _tensors(1003)
    mean, square = _moments(own)
    mean, square = 0.9 * mean + 0.1 * own[1], 0.999 * square + 0.001 * own[1] ** 2
    _step(own)
    for stored, exact in zip(_moments(own), (mean, square), strict=True):
        large = exact.abs() > exact.abs().max() * 2**-15
        assert float(((stored - exact) / exact)[large].abs().max()) <= 1 / 16 + 1e-6


@pytest.mark.parametrize("beta2", [0.999, 0.5])
def test_moments_are_right_in_expectation(beta2: float) -> None:
    numel, seeds = 512, 512
    start = _tensors(numel)
    mean, square = (t.double() for t in _moments(start))
    grad = start[1].double()
    truth = (0.9 * mean + 0.1 * grad, beta2 * square + (1 - beta2) * grad**2)
    sums = [torch.zeros(numel, dtype=torch.float64) for _ in truth]
    for seed in range(seeds):
        own = [t.clone() for t in start]
        _step(own, seed=seed, beta2=beta2)
        for total, stored in zip(sums, _moments(own), strict=True):
            total += stored.double()
    for total, exact in zip(sums, truth, strict=True):
        large = exact.abs() > exact.abs().max() * 2**-15
        spacing = (2.0 ** (torch.frexp(exact.abs())[1].double() - 4))[large]
        # The spacing of the code is that of the ratio to the scale, at most twice as large.
        z = ((total / seeds - exact)[large] / (2 * spacing)) / (0.5 / seeds**0.5)
        assert float(z.abs().max()) < 5
        assert abs(float(z.sum() / z.numel() ** 0.5)) < 4


def test_with_a_seed_v_follows_a_gradient_that_becomes_smaller() -> None:
    """Half of a block: its own largest element would pull all the others along."""
    param, grad = torch.zeros(BLOCK), torch.ones(BLOCK)
    own = [param, grad, *_fresh(param)]
    for count in range(1, 300):
        if count == 100:
            grad[::2] = 0.1
        _step(own, seed=count, step=count, beta2=0.95, lr=1e-4)
    root = _moments(own)[1].sqrt()
    assert abs(float(root[::2].mean()) - 0.1) < 0.01
    assert abs(float(root[1::2].mean()) - 1.0) < 0.05


def test_an_element_without_gradients_does_not_move() -> None:
    param = torch.ones(BLOCK)
    own = [param, torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)), *_fresh(param)]
    own[1][7] = 0.0
    for count in range(1, 20):
        _step(own, step=count, weight_decay=0.0, seed=count)
    assert param[7] == 1
    assert int((param != 1).sum()) == BLOCK - 1


def test_threads_and_neighbours_do_not_change_it() -> None:
    numel = 100_003
    start = _tensors(numel, BF16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            own = [t.clone() for t in start]
            _step(own, seed=1)
            found.append(own)
    finally:
        torch.set_num_threads(before)
    blocks = [t[: 4 if t.dtype is FP32 else 1024].clone() for t in start]
    _step(blocks, seed=1)
    for one, two, part in zip(*found, blocks, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one[: part.numel()], part)


def test_unaligned_tensors_and_nothing_beyond_them() -> None:
    for numel in (17, 1003, 3 << 20):
        usual = _tensors(numel)
        rooms = [torch.full((t.numel() + 3,), 7, dtype=t.dtype) for t in usual]
        views = [room[1:-2].copy_(t) for room, t in zip(rooms, usual, strict=True)]
        copy, room = torch.zeros(numel, dtype=BF16), torch.full((numel + 3,), 7, dtype=BF16)
        _step(usual, copy=copy, seed=2)
        _step(views, copy=room[1:-2], seed=2)
        for view, t in zip((*views, room[1:-2]), (*usual, copy), strict=True):
            assert torch.equal(view, t)
        for each in (*rooms, room):
            assert [float(each[at]) for at in (0, -2, -1)] == [7.0, 7.0, 7.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_bad_gradient_shows_and_stays_in_its_block(value: float) -> None:
    clean, bad = _tensors(3 * BLOCK), _tensors(3 * BLOCK)
    bad[1][BLOCK + 5] = value
    _step(clean)
    _step(bad)
    others = torch.arange(3 * BLOCK) != BLOCK + 5
    assert torch.equal(bad[0][others], clean[0][others])
    assert bool(torch.isnan(bad[0][BLOCK + 5]))
    for index in (3, 5):
        assert torch.isfinite(bad[index]).tolist() == [True, False, True]


def test_subnormal_and_vanishing_states() -> None:
    for size in (1e-44, 1e-38, 1e-25, 0.0):
        param = torch.ones(300)
        own = [param, torch.full((300,), size), *_fresh(param)]
        for count in range(1, 4):
            _step(own, step=count, weight_decay=0.0, seed=count)
        assert all(bool(torch.isfinite(t.float()).all()) for t in own)
        assert bool(((param - 1).abs() <= 0.5).all())


def test_what_does_not_fit_is_refused() -> None:
    own = _tensors(300)
    for index, other, message in (
        (2, own[2].int(), "exp_avg_codes: got torch.int32"),
        (3, own[3][:1], r"exp_avg_scales: got shape \[1\], expected \[2\]"),
        (4, own[4][:299], r"exp_avg_sq_codes: got shape \[299\]"),
        (5, own[5].double(), "exp_avg_sq_scales: got torch.float64"),
        (4, own[2], "exp_avg_codes and exp_avg_sq_codes overlap"),
        (5, own[3], "exp_avg_scales and exp_avg_sq_scales overlap"),
    ):
        changed = [other if at == index else t for at, t in enumerate(own)]
        with pytest.raises((DsError, RuntimeError), match=message):
            _step(changed)
