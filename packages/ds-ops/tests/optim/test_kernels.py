"""The C++ steps of the optimizers, against torch.optim in float64 and against themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_core import ops
from ds_core.errors import DsError
from ds_ops.native import library

SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 1003, 32767, 32768, 32769)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

Step = Callable[[list[torch.Tensor], torch.Tensor, int], None]


def adam(*tensors: torch.Tensor, **given: Any) -> None:
    """One step in C++ of param, grad, exp_avg and exp_avg_sq."""
    _run("adam_step_", tensors, given, "lr beta1 beta2 eps weight_decay step decoupled bias max")


def lion(*tensors: torch.Tensor, **given: Any) -> None:
    _run("lion_step_", tensors, given, "lr beta1 beta2 weight_decay max")


def adagrad(*tensors: torch.Tensor, **given: Any) -> None:
    _run("adagrad_step_", tensors, given, "lr lr_decay eps weight_decay step max")


def sgd(*tensors: torch.Tensor | None, **given: Any) -> None:
    _run("sgd_step_", tensors, given, "lr momentum dampening weight_decay nesterov max first")


_DEFAULTS = {"copy": None, "undo": None, "scale": None, "seed": None, "max": False, "step": 1}
_DEFAULTS |= {"lr": 1e-2, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
_DEFAULTS |= {"decoupled": True, "bias": True, "lr_decay": 0.1, "momentum": 0.9}
_DEFAULTS |= {"dampening": 0.0, "nesterov": False, "first": False}


def _run(name: str, tensors: Sequence[Any], given: dict[str, Any], rates: str) -> None:
    values = _DEFAULTS | given
    order = ["copy", "undo", "scale", *rates.split(), "seed"]
    ops.run(name, *tensors, *(values[key] for key in order), impl="cpp")


#: The step of each, and for each of its states whether it is a square.
STEPS: dict[str, tuple[Callable[..., None], tuple[bool, ...]]] = {
    "adam": (adam, (False, True)),
    "lion": (lion, (False,)),
    "adagrad": (adagrad, (True,)),
    "sgd": (sgd, (False,)),
}


def tensors(
    numel: int, states: Sequence[bool] = (False, True), *, seed: int = 0
) -> list[torch.Tensor]:
    """fp32 param, grad and states."""
    made = torch.Generator().manual_seed(seed + numel)
    found = [torch.randn(numel, generator=made) for _ in range(2 + len(states))]
    return [*found[:2], *(t.square() if s else t for t, s in zip(found[2:], states, strict=True))]


def off(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm().clamp(min=1e-30))


# --- Against torch.optim --------------------------------------------------------------------------


def _follow(numel: int, states: int, make: Callable[..., Any], step: Step) -> None:
    """Five steps in C++ beside five of torch's in float64; compares the parameters."""
    param = tensors(numel)[0]
    wide = param.double().requires_grad_()
    theirs = make([wide])
    ours = [param.clone(), *(torch.zeros(numel) for _ in range(states))]
    for count in range(1, 6):
        grad = tensors(numel, seed=count)[1]
        step(ours, grad, count)
        wide.grad = grad.double()
        theirs.step()
    assert ours[0].numel() == numel
    assert off(ours[0], wide.detach()) <= 1e-6
    kept = [t for t in theirs.state[wide].values() if torch.is_tensor(t) and t.dim() == 1]
    for mine, other in zip(ours[1:], kept, strict=True):
        assert off(mine, other) <= 1e-6


@pytest.mark.parametrize("numel", SIZES)
def test_adamw_is_torchs(numel: int) -> None:
    def step(own: list[torch.Tensor], grad: torch.Tensor, count: int) -> None:
        adam(own[0], grad, own[1], own[2], step=count)

    _follow(numel, 2, lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.01), step)


def test_adam_maximizing_is_torchs() -> None:
    def step(own: list[torch.Tensor], grad: torch.Tensor, count: int) -> None:
        adam(own[0], grad, *own[1:], step=count, decoupled=False, max=True)

    _follow(1003, 2, lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.01, maximize=True), step)


def test_adagrad_is_torchs() -> None:
    def step(own: list[torch.Tensor], grad: torch.Tensor, count: int) -> None:
        adagrad(own[0], grad, own[1], step=count)

    _follow(1003, 1, lambda p: torch.optim.Adagrad(p, 1e-2, 0.1, 0.01, eps=1e-8), step)


@pytest.mark.parametrize(
    ("dampening", "nesterov"), [(0.0, False), (0.0, True), (0.25, False)], ids=str
)
def test_sgd_is_torchs(dampening: float, nesterov: bool) -> None:
    def step(own: list[torch.Tensor], grad: torch.Tensor, count: int) -> None:
        more = {"dampening": dampening, "nesterov": nesterov, "first": count == 1}
        sgd(own[0], grad, own[1], **more)

    def make(p: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(p, 1e-2, 0.9, dampening, 0.01, nesterov)

    _follow(1003, 1, make, step)


def test_sgd_without_momentum_is_torchs() -> None:
    def step(own: list[torch.Tensor], grad: torch.Tensor, count: int) -> None:
        sgd(own[0], grad, None, momentum=0.0)

    _follow(1003, 0, lambda p: torch.optim.SGD(p, 1e-2, weight_decay=0.01), step)


def test_lion_is_its_paper() -> None:
    param, grad, mean = tensors(1003, (False,))
    p, g, m = param.double(), grad.double(), mean.double()
    lion(param, grad, mean, beta2=0.99)
    p = p * (1 - 1e-2 * 0.01) - 1e-2 * torch.sign(0.9 * m + 0.1 * g)
    assert off(param, p) <= 1e-6
    assert off(mean, 0.99 * m + 0.01 * g) <= 1e-6


@pytest.mark.parametrize("numel", [1, 1003, 40000])
def test_lambs_norms_and_direction(numel: int) -> None:
    param, grad, mean, square = tensors(numel)
    update = torch.empty(numel)
    before = [t.double() for t in (param, grad, mean, square)]
    args = (update, None, 0.9, 0.999, 1e-6, 0.01, 3, True)
    norms = ops.run("lamb_update_", param, grad, mean, square, *args, impl="cpp")
    p, g, m, v = before
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    direction = m / (1 - 0.9**3) / ((v / (1 - 0.999**3)).sqrt() + 1e-6) + 0.01 * p
    assert off(update, direction) <= 1e-6
    assert off(norms, torch.stack([p.square().sum(), direction.square().sum()])) <= 1e-6
    ops.run("lamb_apply_", param, update, None, 1e-2, impl="cpp")
    assert off(param, p - 1e-2 * direction) <= 1e-6


def test_lambs_direction_is_zero_where_nothing_happened() -> None:
    param, grad, mean, square = (torch.zeros(9) for _ in range(4))
    update = torch.full((9,), torch.nan)
    args = (update, None, 0.9, 0.999, 0.0, 0.0, 1, True)
    norms = ops.run("lamb_update_", param, grad, mean, square, *args, impl="cpp")
    assert not update.any()
    assert not norms.any()


# --- Formats --------------------------------------------------------------------------------------

_FORMATS = [
    (param, grad, state, copy)
    for param in (FP32, BF16, FP16)
    for grad in (FP32, BF16, FP16)
    for state in (FP32, BF16)
    for copy in (None, FP32, BF16, FP16)
]


@pytest.mark.parametrize("name", STEPS)
def test_all_formats_round_the_same_result(name: str) -> None:
    """What is stored is the fp32 result rounded to nearest, and the copy is of what is stored."""
    step, states = STEPS[name]
    for formats in _FORMATS:
        of_param, of_grad, of_state, of_copy = formats
        param, grad, *own = tensors(531, states)
        low = [param.to(of_param), grad.to(of_grad), *(t.to(of_state) for t in own)]
        wide = [t.float().clone() for t in low]
        copy = None if of_copy is None else torch.full((531,), torch.nan, dtype=of_copy)
        scale = torch.tensor(0.25)
        step(*low, copy=copy, scale=scale)
        step(*wide, scale=scale)
        for got, exact in zip(low, wide, strict=True):
            assert torch.equal(got, exact.to(got.dtype)), formats
        assert copy is None or torch.equal(copy, low[0].to(copy.dtype)), formats


@pytest.mark.parametrize("name", STEPS)
def test_unaligned_tensors_and_nothing_beyond_them(name: str) -> None:
    step, states = STEPS[name]
    for numel in (1, 17, 1003, 4 << 20) if name == "adam" else (17, 1003):
        usual = tensors(numel, states)
        copy = torch.zeros(numel, dtype=BF16)
        rooms = [torch.full((numel + 3,), 7.0) for _ in usual]
        copy_room = torch.full((numel + 3,), 7.0, dtype=BF16)
        views = [room[1:-2].copy_(t) for room, t in zip(rooms, usual, strict=True)]
        step(*usual, copy=copy)
        step(*views, copy=copy_room[1:-2])
        for view, t in zip((*views, copy_room[1:-2]), (*usual, copy), strict=True):
            assert torch.equal(view, t)
        for room in (*rooms, copy_room):
            assert [float(room[at]) for at in (0, -2, -1)] == [7.0, 7.0, 7.0]


def test_shapes_do_not_matter() -> None:
    flat = tensors(105)
    shaped = [t.clone().view(3, 5, 7) for t in flat]
    adam(*flat)
    adam(*shaped)
    assert torch.equal(shaped[0].view(-1), flat[0])
    scalars = [t[0].clone() for t in flat]
    adam(*scalars)
    assert scalars[0].dim() == 0


# --- Rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_stochastic_rounding_is_right_in_expectation(name: str) -> None:
    step, states = STEPS[name]
    numel, seeds = 512, 512
    start = [t.to(BF16) for t in tensors(numel, states)]
    exact = [t.float() for t in start]
    step(*exact)
    sums = [torch.zeros(numel, dtype=torch.float64) for _ in exact]
    for seed in range(seeds):
        own = [t.clone() for t in start]
        step(*own, seed=seed)
        for total, t in zip(sums, own, strict=True):
            total += t.double()
            # One of the two neighbours, never further away.
        assert all(
            bool(((t.float() - e).abs() <= e.abs() * 2**-7).all())
            for t, e in zip(own, exact, strict=True)
        )
    for index in (0, *range(2, len(exact))):
        truth = exact[index].double()
        spacing = 2.0 ** (torch.frexp(truth.abs())[1].double() - 8)
        # Of all elements together; one of them rounds with a deviation of half a spacing at most.
        z = ((sums[index] / seeds - truth) / spacing).sum() / (0.5 * (numel / seeds) ** 0.5)
        assert abs(float(z)) < 4, (name, index)
        # And of each.
        z = ((sums[index] / seeds - truth) / spacing) / (0.5 / seeds**0.5)
        assert float(z.abs().max()) < 5, (name, index)


def test_random_bits_differ_by_element_and_seed() -> None:
    half = torch.full((1 << 16,), 1 + 2**-8)  # in the middle of two numbers of bf16

    def ups(seed: int) -> torch.Tensor:
        param = half.to(BF16)
        grad = (half - param.float()).neg()  # a step of lr 1 leads to `half`
        args = (param, grad, None, None, None, None, 1.0, 0.0, 0.0, 0.0, False, False, True, seed)
        ops.run("sgd_step_", *args, impl="cpp")
        return (param.float() > half).double()

    first, second = ups(0), ups(1)
    sigma = 0.5 / first.numel() ** 0.5
    assert abs(float(first.mean()) - 0.5) < 4 * sigma
    for other in (second, first.roll(1), first.roll(16), first.roll(256)):
        assert abs(float((first == other).double().mean()) - 0.5) < 4 * sigma


def test_rounding_does_not_depend_on_threads_or_neighbours() -> None:
    numel = 100_003
    start = [t.to(BF16) for t in tensors(numel)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            own = [t.clone() for t in start]
            adam(*own, seed=9)
            found.append(own)
    finally:
        torch.set_num_threads(before)
    short = [t[:1001].clone() for t in start]
    adam(*short, seed=9)
    for one, two, part in zip(*found, short, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one[:1001], part)


# --- Undo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("of_param", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("of_state", [FP32, BF16], ids=str)
def test_undo_gives_back_every_bit(name: str, of_param: torch.dtype, of_state: torch.dtype) -> None:
    step, states = STEPS[name]
    for numel in (0, 1, 17, 1003):
        param, grad, *own = tensors(numel, states)
        kept = [param.to(of_param), *(t.to(of_state) for t in own)]
        if numel > 3:  # numbers that arithmetic would not give back
            for t in kept:
                t[0], t[1], t[2] = torch.nan, -0.0, torch.inf
                t.view(torch.uint8)[3 * t.element_size()] ^= 1
        before = [t.clone().view(torch.uint8) for t in kept]
        undo = torch.empty(sum(t.nbytes for t in kept), dtype=torch.uint8)
        copy = torch.zeros(numel, dtype=BF16)
        step(kept[0], grad, *kept[1:], undo=undo, copy=copy)
        plain = [torch.nan_to_num(t) for t in kept]
        ops.run("step_undo_", kept[0], kept[1:], copy, undo, impl="cpp")
        for t, old in zip(kept, before, strict=True):
            assert torch.equal(t.view(torch.uint8), old)
        assert torch.equal(copy.nan_to_num(), kept[0].to(BF16).nan_to_num())
        step(kept[0], grad, *kept[1:])
        for t, old in zip(kept, plain, strict=True):
            assert torch.equal(torch.nan_to_num(t), old)


def test_a_large_undo_goes_around_the_caches() -> None:
    own = tensors(3 << 20)
    before = [t.clone() for t in own]
    undo = torch.empty(12 * own[0].numel(), dtype=torch.uint8)
    adam(*own, undo=undo)
    ops.run("step_undo_", own[0], own[2:], None, undo, impl="cpp")
    assert all(torch.equal(t, old) for t, old in zip(own, before, strict=True))


# --- Numbers that are none, and numbers that are hardly any ---------------------------------------


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bad_gradient_stays_in_its_element(name: str, value: float) -> None:
    step, states = STEPS[name]
    clean, bad = tensors(1003, states), tensors(1003, states)
    bad[1][500] = value
    step(*clean)
    step(*bad)
    for index, (t, other) in enumerate(zip(bad, clean, strict=True)):
        if index != 1:
            others = torch.arange(1003) != 500
            assert torch.equal(t[others], other[others])
    assert not torch.isfinite(bad[2][500])


@pytest.mark.parametrize("name", STEPS)
def test_subnormal_numbers_are_numbers(name: str) -> None:
    step, states = STEPS[name]
    param, grad, *own = (t * 1e-40 for t in tensors(1003, states))
    assert bool((grad != 0).any())
    low = [t.to(BF16) for t in (param, grad)]
    step(param, grad, *own)
    step(*low, *(t.clone() for t in own))
    assert all(bool(torch.isfinite(t).all()) for t in (param, *own, *low))


def test_the_scale_unscales_what_overflows_after_it() -> None:
    param, grad, mean, square = tensors(33)
    other = [t.clone() for t in (param, grad, mean, square)]
    adam(param, grad * 65536, mean, square, scale=torch.tensor(1 / 65536))
    adam(*other)
    assert torch.equal(param, other[0])


# --- Refusals -------------------------------------------------------------------------------------


def test_tensors_that_overlap_are_refused() -> None:
    room = torch.zeros(24)
    a, b, c, d = room[:8], room[4:12], room[12:20], torch.zeros(8)
    with pytest.raises((DsError, RuntimeError), match="param and exp_avg overlap"):
        adam(a, d, b, c)
    with pytest.raises((DsError, RuntimeError), match="param and grad overlap"):
        adam(a, b, c, d)
    with pytest.raises((DsError, RuntimeError), match="exp_avg_sq and copy overlap"):
        adam(a, torch.zeros(8), c, d, copy=d)
    undo = torch.zeros(32).view(torch.uint8)[:96]
    with pytest.raises((DsError, RuntimeError), match="exp_avg and undo overlap"):
        adam(a, d, undo[32:64].view(torch.float32), torch.zeros(8), undo=undo)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(9)}, r"grad: got shape \[9\], expected \[8\]"),
        ({"grad": torch.zeros(8).double()}, "grad: got torch.float64"),
        ({"mean": torch.zeros(8).half()}, "exp_avg: got torch.float16"),
        ({"square": torch.zeros(8).bfloat16()}, "exp_avg_sq: got torch.bfloat16"),
        ({"param": torch.zeros(16)[::2]}, "param: not contiguous"),
        ({"copy": torch.zeros(4, 2)}, r"copy: got shape \[4, 2\]"),
        ({"undo": torch.zeros(95, dtype=torch.uint8)}, r"undo: got shape \[95\], expected \[96\]"),
        ({"scale": torch.zeros(1)}, r"grad_scale: .* of shape \[1\]"),
        ({"step": 0}, "step: got 0"),
        ({"lr": -1.0}, "lr: got -1"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    own: dict[str, Any] = dict(zip(("param", "grad", "mean", "square"), tensors(8), strict=True))
    own |= change
    with pytest.raises((DsError, RuntimeError), match=message):
        adam(*(own.pop(key) for key in ("param", "grad", "mean", "square")), **own)


# --- Instruction sets -----------------------------------------------------------------------------


@pytest.mark.skipif("DS_OPS_ISA" in os.environ, reason="is run for each instruction set")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_older_processors_compute_the_same(isa: str) -> None:
    """All of these tests again, as a processor without the newer instructions runs them."""
    if library.isa() == "baseline":
        pytest.skip("this processor has no other instruction set")
    files = [str(path) for path in sorted(Path(__file__).parent.glob("test_kernels*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "DS_OPS_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_lazy_copy_becomes_one_of_its_own() -> None:
    param, *rest = tensors(1003)
    before = param.clone()
    lazy = torch._lazy_clone(param)
    adam(lazy, *rest)
    assert torch.equal(param, before)
    assert not torch.equal(lazy, before)
