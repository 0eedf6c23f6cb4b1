"""MLP and loss by tiles: the untiled numbers, one gradient per parameter, and their memory."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_memory import Peak, live_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from zero_loops import compare
from zero_models import CASES, VOCAB, WIDTH, Block, Case, tokens

import ds_zero
from ds_core import comm, ops
from ds_core.replicated import Replicated
from ds_core.testing import run_ranks
from ds_zero import TiledLinear, TiledMLP, tiled_loss, tiled_mlp

each_of = functools.partial(F.cross_entropy, reduction="none")


def mlp(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(32, 96), nn.SiLU(), nn.Dropout(dropout), nn.Linear(96, 32))
    return nn.Sequential(*layers).to(dtype)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.grad for name, param in module.named_parameters()}


@pytest.mark.parametrize(
    ("shape", "dim", "num_tiles"),
    [((48, 32), 0, 4), ((2, 50, 32), -2, 7), ((2, 9, 32), 1, 100), ((3, 5, 4, 32), 0, 2)],
    ids=["even", "uneven", "more-than-positions", "first-of-four"],
)
def test_mlp_gives_what_the_whole_gives(shape: tuple[int, ...], dim: int, num_tiles: int):
    module, twin = mlp(torch.float64), mlp(torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected, found = module(x), tiled_mlp(twin, y, num_tiles=num_tiles, dim=dim)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradient, gradients(module)[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_mlp_has_the_same_bits(dtype: torch.dtype):
    module = mlp(dtype)
    x = torch.randn(2, 256, 32, dtype=dtype)
    tiled = TiledMLP(module, num_tiles=4)
    assert torch.equal(tiled(x), module(x))
    with torch.no_grad():
        assert torch.equal(tiled(x), module(x))


def test_gradients_of_bf16_parameters_are_summed_in_fp32():
    """Of 64 tiles, so that sums in bf16 would be off by several of its steps."""
    module, exact = mlp(torch.bfloat16), mlp(torch.bfloat16).double()
    x = torch.randn(64 * 8, 32, dtype=torch.bfloat16)
    tiled_mlp(module, x, num_tiles=64).sum().backward()
    exact(x.double()).sum().backward()
    bias, truth = module[3].bias.grad.double(), exact[3].bias.grad
    assert torch.equal(bias, truth.bfloat16().double())
    error = (module[3].weight.grad.double() - exact[3].weight.grad).norm()
    assert float(error / exact[3].weight.grad.norm()) < 2**-8


def test_dropout_draws_again_in_backward_and_once_for_the_program():
    module = mlp(dropout=0.5)
    x = torch.randn(64, 32, requires_grad=True)
    torch.manual_seed(5)
    found = tiled_mlp(module, x, num_tiles=4)
    torch.rand(3)
    before = torch.get_rng_state()
    found.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    twin, y = mlp(dropout=0.5), x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    expected = torch.cat([twin(part) for part in y.split(16)])
    expected.sum().backward()
    assert torch.equal(found, expected)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(module[0].weight.grad, twin[0].weight.grad)


def test_autocast_of_forward_holds_in_backward():
    module, twin = mlp(), mlp()
    x = torch.randn(64, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = tiled_mlp(module, x, num_tiles=4), twin(y)
        again = module(x)  # a weight that tiles had cast without gradient must not be found here
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, expected)
    (found.float().sum() + 0 * again.float().sum()).backward()
    expected.float().sum().backward()
    torch.testing.assert_close(module[0].weight.grad, twin[0].weight.grad, rtol=0.02, atol=0.02)
    torch.testing.assert_close(x.grad, y.grad, rtol=0.02, atol=0.02)


def test_each_parameter_is_told_its_gradient_once():
    module, calls = mlp(), []
    for name, param in module.named_parameters():
        param.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    x = torch.randn(64, 32)
    (tiled_mlp(module, x, num_tiles=8).sum()).backward()
    assert sorted(calls) == sorted(name for name, _ in module.named_parameters())


def test_frozen_and_unused_parameters_have_no_gradient():
    module = mlp()
    module[0].requires_grad_(False)
    module.register_parameter("spare", nn.Parameter(torch.ones(3)))
    x = torch.randn(16, 32, requires_grad=True)
    tiled_mlp(module, x, num_tiles=4).sum().backward()
    assert [n for n, g in gradients(module).items() if g is None] == ["spare", "0.weight", "0.bias"]
    module.requires_grad_(False)
    assert not tiled_mlp(module, x.detach(), num_tiles=4).requires_grad


def test_a_function_says_what_it_trains():
    weight = nn.Parameter(torch.randn(32, 8))
    x = torch.randn(12, 32)
    found = tiled_mlp(lambda part: part @ weight, x, num_tiles=3, params=[weight])
    found.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0)[:, None].expand(32, 8))
    with pytest.raises(ds_zero.ShardError, match=r"params: got None, and function is no "):
        tiled_mlp(lambda part: part @ weight, x, num_tiles=3)


def test_an_empty_sequence_is_one_empty_tile():
    x = torch.randn(2, 0, 32, requires_grad=True)
    assert TiledMLP(mlp())(x).shape == (2, 0, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: tiled_mlp(mlp(), x, num_tiles=0), "num_tiles: got 0, expected at least 1"),
        (lambda x: tiled_mlp(mlp(), x, dim=2), "dim: got 2, expected a dimension of hidden"),
        (
            lambda x: tiled_mlp(nn.Flatten(0), x, num_tiles=2),
            r"returned shape \[256\] for a tile of shape \[8, 32\], expected .* size 8",
        ),
        (
            lambda x: tiled_mlp(lambda t: (t,), x, num_tiles=2, params=[]),
            "module: returned tuple for a tile",
        ),
    ],
    ids=["tiles", "dim", "shape", "tuple"],
)
def test_mlp_refuses_nonsense(call: Callable[[torch.Tensor], Any], message: str):
    with pytest.raises(ds_zero.ShardError, match=message):
        call(torch.randn(16, 32))


def activations(num_tiles: int) -> int:
    """The most bytes beside weights, input, output and their gradients."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 512), nn.SiLU(), nn.Linear(512, 16))
    x = torch.randn(2048, 16, requires_grad=True)
    before = live_bytes()
    with Peak() as peak:
        tiled_mlp(module, x, num_tiles=num_tiles).sum().backward()
    return peak.bytes - before


def test_activation_memory_falls_with_the_number_of_tiles():
    # Of each position: hidden, its activation, and their gradients, of which three live at once.
    whole = 4 * 2048 * 512
    peaks = {count: run_ranks(1, activations, count)[0] for count in (1, 4, 16)}
    constant = 4 * 4 * 2048 * 16 + 3 * 4 * 2 * 16 * 512 + 20_000
    assert peaks[1] > 3 * whole
    for count in (4, 16):
        assert peaks[count] <= 3 * whole / count + constant


# ---------------------------------------------------------------------- loss


def head_and_tokens(dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    torch.manual_seed(0)
    head = nn.Linear(24, 50, dtype=dtype)
    hidden = torch.randn(3, 37, 24, dtype=dtype, requires_grad=True)
    targets = torch.randint(50, (3, 37))
    targets[0, :20] = -100  # whole tiles of them
    targets[2, 5] = -100
    return head, hidden, targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("given", [None, each_of], ids=["default", "given"])
@pytest.mark.parametrize("num_tiles", [None, 1, 7])
def test_loss_is_that_of_all_logits(num_tiles: int | None, given: Any, reduction: str):
    head, hidden, targets = head_and_tokens()
    found = tiled_loss(head, hidden, targets, loss=given, num_tiles=num_tiles, reduction=reduction)
    factor = torch.randn_like(found)
    found.backward(factor)
    ours = [hidden.grad, *gradients(head).values()]
    hidden.grad = None
    head.zero_grad()
    logits = head(hidden).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction=reduction).view_as(found)
    expected.backward(factor)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(ours, [hidden.grad, *gradients(head).values()], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_ignored_tokens_count_nothing_whatever_the_loss_makes_of_them():
    head, hidden, targets = head_and_tokens()

    def bad(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return each_of(logits, targets.clamp(min=0)) + (targets < 0) * 1e6

    found = tiled_loss(head, hidden, targets, loss=bad, num_tiles=5)
    expected = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(found, expected)


def test_a_loss_of_other_targets_and_with_parameters_of_its_own():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return self.scale * (logits - wanted).square().sum(-1)

    head, hidden, _ = head_and_tokens()
    loss, wanted = Scaled(), torch.randn(3, 37, 50, dtype=torch.float64)
    found = tiled_loss(head, hidden, wanted, loss=loss, num_tiles=4)
    found.backward()
    expected = (head(hidden) - wanted).square().sum(-1).mean()
    torch.testing.assert_close(found, 2 * expected)
    torch.testing.assert_close(loss.scale.grad, expected.detach())


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("given", [None, each_of], ids=["default", "given"])
def test_logits_of_all_tokens_never_exist(given: Any):
    head = nn.Linear(8, 1000)
    hidden = torch.randn(640, 8, requires_grad=True)
    targets = torch.randint(1000, (640,))
    tiled_loss(head, hidden, targets, loss=given, num_tiles=10)
    with Largest() as largest:
        tiled_loss(head, hidden, targets, loss=given, num_tiles=10).backward()
    assert largest.numel <= 64 * 1000


def test_cross_entropy_of_a_linear_head_is_an_op_where_a_kernel_is_installed(
    monkeypatch: pytest.MonkeyPatch,
):
    calls = []

    class Fast:
        op, name, priority, devices = "linear_cross_entropy", "fast", 10, ()

    head, hidden, targets = head_and_tokens(torch.float32)
    module = importlib.import_module("ds_core.ops.linear_cross_entropy")
    original = module.linear_cross_entropy

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(options["chunk"])
        return original(*args, **options)

    monkeypatch.setattr(module, "linear_cross_entropy", counted)
    monkeypatch.setattr(ops, "choose", lambda *_: ops.registry.Choice(Fast(), {}))
    with ops.use(linear_cross_entropy="reference"):
        found = tiled_loss(head, hidden, targets, num_tiles=5, reduction="sum")
    tiled_loss(head, hidden, targets, num_tiles=5, loss=each_of)
    tiled_loss(nn.Sequential(head), hidden, targets, num_tiles=5)
    tiled_loss(head.double(), hidden.double(), targets, num_tiles=5)
    assert calls == [23]
    logits = head(hidden.double()).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    torch.testing.assert_close(found.double(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "average"}, "reduction: got 'average', expected"),
        (
            {"targets": torch.zeros(3, 36).long()},
            r"targets: got shape \[3, 36\], expected \[3, 37\]",
        ),
        ({"loss": F.cross_entropy}, r'loss: returned \[\] for 23 tokens, .* reduction="none"'),
        ({"head": torch.tanh}, "params: got None, and builtin_function_or_method is no nn.Module"),
    ],
    ids=["reduction", "targets", "mean", "function"],
)
def test_loss_refuses_nonsense(change: dict, message: str):
    head, hidden, targets = head_and_tokens()
    given = {"head": head, "hidden": hidden, "targets": targets, "loss": each_of, "num_tiles": 5}
    with pytest.raises(ds_zero.ShardError, match=message):
        tiled_loss(**{**given, **change})


# ---------------------------------------------------------------------- sharded


class Long(nn.Module):
    """A language model of tiled blocks, whose head and loss are tiled too.

    Args:
        remat: activation checkpointing of each block around its tiles.
        tiles: the MLP's layers are `TiledLinear`s.
    """

    def __init__(self, remat: bool = False, tiles: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(TiledMLP(Block(), num_tiles=3) for _ in range(2))
        if tiles:
            for block in self.blocks:
                block.module.up = TiledLinear(WIDTH, 17, in_splits=2, out_splits=2)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.remat = remat

    def features(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).cumsum(1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.remat else block(x)
        return x

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.features(ids)[:, :-1]
        return tiled_loss(self.head, x, ids[:, 1:], loss=each_of, num_tiles=4)


class Outside(Long):
    """Its loss is computed by the caller."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.features(ids)[:, :-1]


class Default(Long):
    """Its loss is cross entropy, computed by tiles or by a kernel."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return tiled_loss(self.head, self.features(ids)[:, :-1], ids[:, 1:], num_tiles=4)


def default_outside(model: Any, ids: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    losses = tiled_loss(model.head, model(ids), ids[:, 1:], num_tiles=4, reduction="none")
    return losses.mean() + tiled_loss(model.head, model(ids), ids[:, 1:], num_tiles=4)


def own(model: nn.Module, ids: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    return model(ids)


def outside(model: Any, ids: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    return tiled_loss(model.head, model(ids), ids[:, 1:], loss=each_of, num_tiles=4)


CASES["tiled"] = Case(Long, own, tokens)
CASES["tiled-recomputed"] = Case(lambda: Long(remat=True), own, tokens)
CASES["tiled-tiles"] = Case(lambda: Long(tiles=True), own, tokens)
CASES["tiled-outside"] = Case(Outside, outside, tokens)
CASES["default"] = Case(Default, own, tokens)
CASES["default-outside"] = Case(Outside, default_outside, tokens)
NAMES = ("tiled", "tiled-recomputed", "tiled-tiles", "tiled-outside")


def trains_alike(stage: int) -> None:
    for name in NAMES:
        compare(name, stage, steps=3)
    # The module inside the tiles as a unit, so that each tile asks for it.
    compare("tiled", stage, steps=3, units=[Block, "head"], prefetch=0)
    compare("tiled-outside", stage, steps=3, accumulate=2, max_norm=0.5)
    for name in ("default", "default-outside"):
        compare(name, stage, steps=3, dtype=torch.float32, tolerance=1e-4)


def test_training_is_that_of_one_process(stage: int):
    run_ranks(2, trains_alike, stage, timeout_s=120)


def replicated_alike() -> None:
    torch.set_default_dtype(torch.float64)
    found = []
    for tiled in (True, False):
        torch.manual_seed(0)
        model = Long()
        if not tiled:
            for block in model.blocks:
                block.num_tiles = 1
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sharding = Replicated(model, optimizer, mesh=comm.Mesh.world())
        for step in range(3):
            model(tokens(dist.get_rank(), step)).backward()
            sharding.update()
            sharding.zero_grad()
        found.append(sharding.full_state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-12, atol=1e-12)


def test_plain_data_parallelism_is_that_of_the_untiled_model():
    run_ranks(2, replicated_alike)


def gathers(num_tiles: int) -> tuple[int, int]:
    """Gathers of the head in a step, and reductions in all."""
    torch.manual_seed(0)
    model = Outside()
    mesh = comm.Mesh.world()
    optimizer = ds_zero.shard(
        model, torch.optim.SGD(model.parameters(), lr=0.1), 3, mesh=mesh, min_unit_numel=0
    )
    for step in range(3):
        ids = tokens(0, step)
        with mesh.ledger.measure() as sent:
            tiled_loss(
                model.head, model(ids), ids[:, 1:], loss=each_of, num_tiles=num_tiles
            ).backward()
        optimizer.zero_grad()
    return (
        sent.num_calls(op="all_gather", caller="head"),
        sent.num_calls(op="reduce_scatter"),
    )


def test_tiles_share_one_gather_of_their_head_and_one_reduction():
    for head, reductions in run_ranks(2, gathers, 4):
        assert head == 2  # forward and backward
        assert reductions == 4  # embedding, two blocks, head
