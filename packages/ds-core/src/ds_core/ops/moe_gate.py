"""Routing of tokens to experts: the k best of each token and their weights.

Source: Shazeer et al. 2017, section 2.1 (top-k gate); Wang et al. 2024 (bias in place of an
auxiliary loss); DeepSeek-AI 2024 (V3), section 2.1.2 (sigmoid scores, groups of experts).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_shape,
    expect_together,
    randn,
    unaligned,
    wide,
    wide_dtype,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

NAME = "moe_gate"
#: Added to the sum of weights before they are divided by it.
TINY = 1e-20

Scoring = Literal["softmax", "sigmoid"]


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        weights: `[tokens, k]`, fp32, of each chosen expert, the best first.
        indices: `[tokens, k]`, int32, the chosen experts.
        counts: `[experts]`, int32: how often each is chosen.
        probabilities: `[tokens, experts]`, fp32.
    """

    weights: torch.Tensor
    indices: torch.Tensor
    counts: torch.Tensor
    probabilities: torch.Tensor


def moe_gate(
    logits: torch.Tensor,
    k: int,
    *,
    normalize: bool = True,
    scoring: Scoring = "softmax",
    bias: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int | None = None,
    scale: float = 1.0,
) -> Routing:
    """The `k` experts with the largest probabilities of each token; of equal ones the lowest.

    The load-balancing loss of Switch and GShard is, from the result,
    `experts * (probabilities.mean(0) * counts / (tokens * k)).sum()`.

    Args:
        logits: `[tokens, experts]`; fp32, bf16 or fp16; computed in fp32.
        k: experts of a token.
        normalize: divide the weights of a token by their sum.
        scoring: probabilities by softmax over experts, or by sigmoid of each.
        bias: `[experts]`, fp32: added to probabilities when experts are chosen, and only then.
        groups: cut the experts into this many groups of neighbours, and choose from the
            `top_groups` whose two best experts have the largest sum; 1: choose from all.
        top_groups: None: all of them.
        scale: factor of the weights.

    A NaN among logits makes the probabilities that depend on it NaN, and is chosen last; indices
    are always of k different experts.

    Returns a `Routing`, differentiable in logits through its weights and probabilities.
    Raises OpError or RuntimeError for arguments that do not fit.
    """
    top_groups = groups if top_groups is None else top_groups
    return Routing(*run(NAME, logits, k, normalize, scoring, bias, groups, top_groups, scale))


def reference(
    logits: torch.Tensor,
    k: int,
    normalize: bool,
    scoring: str,
    bias: torch.Tensor | None,
    groups: int,
    top_groups: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `moe_gate`: `softmax(logits)` or `sigmoid(logits)`, and a stable sort."""
    _check(logits, k, scoring, bias, groups, top_groups, scale)
    wide_logits = wide(logits)
    probabilities = wide_logits.softmax(-1) if scoring == "softmax" else wide_logits.sigmoid()
    indices = _choose(wide_logits, probabilities, k, bias, groups, top_groups)
    weights = probabilities.gather(1, indices)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    counts = indices.flatten().bincount(minlength=logits.shape[1])
    return weights * scale, indices.int(), counts.int(), probabilities


@torch.no_grad()
def _choose(
    logits: torch.Tensor,
    probabilities: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    groups: int,
    top_groups: int,
) -> torch.Tensor:
    # Where probabilities have the order of logits, these decide: rounding makes no ties of them.
    scores = logits if bias is None and groups == 1 else probabilities
    if bias is not None:
        scores = scores + bias
    scores = _without_nan(scores)
    by_group = scores.unflatten(1, (groups, -1))
    best_two = by_group.sort(-1, descending=True).values[..., :2].sum(-1)
    order = _without_nan(best_two).sort(stable=True, descending=True).indices
    kept = torch.zeros_like(best_two, dtype=torch.bool)
    kept.scatter_(1, order[:, :top_groups], True)
    kept = kept.repeat_interleave(by_group.shape[2], 1)
    order = scores.sort(stable=True, descending=True).indices
    # All that are kept before all that are not, each in their order.
    kept_first = kept.gather(1, order).int().sort(stable=True, descending=True).indices
    return order.gather(1, kept_first)[:, :k]


def _without_nan(scores: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(scores.isnan(), -torch.inf)


def backward_reference(
    grad_weights: torch.Tensor | None,
    grad_probabilities: torch.Tensor | None,
    logits: torch.Tensor,
    probabilities: torch.Tensor,
    indices: torch.Tensor,
    normalize: bool,
    scoring: str,
    scale: float,
) -> torch.Tensor:
    """Gradient of logits. With w = scale p / s and s the sum of the chosen p,

    `dp = scale / s * (dw - sum(dw * p) / s)` where chosen, and of softmax
    `dlogits = p * (dp - sum(dp * p))`, of sigmoid `p * (1 - p) * dp`.
    """
    grad = torch.zeros_like(probabilities)
    if grad_probabilities is not None:
        grad = grad + grad_probabilities
    if grad_weights is not None:
        chosen = probabilities.gather(1, indices.long())
        own = grad_weights * scale
        if normalize:
            total = chosen.sum(-1, keepdim=True) + TINY
            own = (own - (own * chosen).sum(-1, keepdim=True) / total) / total
        grad = grad.scatter_add(1, indices.long(), own)
    if scoring == "softmax":
        inner = (grad * probabilities).sum(-1, keepdim=True)
        return (probabilities * (grad - inner)).to(logits.dtype)
    return (probabilities * (1 - probabilities) * grad).to(logits.dtype)


def _check(
    logits: torch.Tensor,
    k: int,
    scoring: str,
    bias: torch.Tensor | None,
    groups: int,
    top_groups: int,
    scale: float,
) -> None:
    expect_float(NAME, "logits", logits)
    fits = logits.dim() == 2 and logits.shape[1] > 0
    expect(fits, NAME, "logits", f"shape {list(logits.shape)}", "[tokens, experts]")
    experts = logits.shape[1]
    expect(1 <= k <= experts, NAME, "k", k, f"1 to {experts}")
    fits = scoring in ("softmax", "sigmoid")
    expect(fits, NAME, "scoring", f"'{scoring}'", "'softmax' or 'sigmoid'")
    fits = groups >= 1 and experts % groups == 0
    expect(fits, NAME, "groups", groups, f"a divisor of {experts} experts")
    fits = 1 <= top_groups <= groups and top_groups * (experts // groups) >= k
    wanted = f"at most {groups}, with k = {k} experts or more in them"
    expect(fits, NAME, "top_groups", top_groups, wanted)
    expect(math.isfinite(scale), NAME, "scale", scale, "a finite number")
    if bias is not None:
        fits = bias.dtype in (torch.float32, torch.float64)
        expect(fits, NAME, "bias", bias.dtype, torch.float32)
        expect_shape(NAME, "bias", bias, (experts,))
        expect_together(NAME, logits, bias=bias)


def fake(
    logits: torch.Tensor,
    k: int,
    normalize: bool,
    scoring: str,
    bias: torch.Tensor | None,
    groups: int,
    top_groups: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(logits, k, scoring, bias, groups, top_groups, scale)
    tokens, experts = logits.shape
    dtype = wide_dtype(logits.dtype)
    return (
        logits.new_empty((tokens, k), dtype=dtype),
        logits.new_empty((tokens, k), dtype=torch.int32),
        logits.new_empty((experts,), dtype=torch.int32),
        logits.new_empty((tokens, experts), dtype=dtype),
    )


def backward_fake(
    grad_weights: torch.Tensor | None,
    grad_probabilities: torch.Tensor | None,
    logits: torch.Tensor,
    probabilities: torch.Tensor,
    indices: torch.Tensor,
    normalize: bool,
    scoring: str,
    scale: float,
) -> torch.Tensor:
    return torch.empty_like(logits)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, _, normalize, scoring, _, _, _, scale = inputs
    _, indices, counts, probabilities = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, probabilities, indices)
    ctx.options = (normalize, scoring, scale)


def _backward(
    call: Callable[..., Any],
    ctx: Any,
    grad_weights: torch.Tensor | None,
    _: Any,
    __: Any,
    grad_probabilities: torch.Tensor | None,
) -> Any:
    grads = [
        None if grad is None else grad.contiguous() for grad in (grad_weights, grad_probabilities)
    ]
    if grads == [None, None]:
        return (None,) * 8
    return call("moe_gate_backward", *grads, *ctx.saved_tensors, *ctx.options), *(None,) * 7


# --- Tests and measures ---------------------------------------------------------------------------


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Odd, single and empty sizes, k of one and of all, ties, a bias, groups, both scorings."""

    def logits(*shape: int) -> torch.Tensor:
        return randn(device, dtype, *shape)

    bias = randn(device, torch.float32, 32)
    ties = logits(9, 20).sign()
    minus = logits(5, 7)
    minus[:, 2:] = -torch.inf
    return [
        (logits(33, 8), 2, True, "softmax", None, 1, 1, 1.0),
        (logits(7, 127), 8, True, "softmax", None, 1, 1, 1.5),
        (unaligned(logits(5, 64)), 6, False, "sigmoid", None, 1, 1, 1.0),
        (logits(17, 32), 4, True, "sigmoid", bias, 8, 3, 2.5),
        (logits(17, 32), 4, False, "softmax", bias, 1, 1, 1.0),
        (logits(9, 12), 3, True, "softmax", None, 12, 5, 1.0),
        (ties, 5, True, "softmax", None, 1, 1, 1.0),
        (ties, 5, True, "sigmoid", None, 5, 2, 1.0),
        (minus, 4, True, "softmax", None, 1, 1, 1.0),
        (logits(6, 5), 5, True, "softmax", None, 1, 1, 1.0),
        (logits(3, 1), 1, True, "softmax", None, 1, 1, 1.0),
        (logits(0, 16), 2, True, "softmax", None, 1, 1, 1.0),
    ]


def backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for index, args in enumerate(cases(device, dtype)):
        logits, _, normalize, scoring, *_, scale = args
        _, indices, _, probabilities = reference(*args)
        dw = randn(device, torch.float32, *indices.shape, seed=1)
        dp = randn(device, torch.float32, *probabilities.shape, seed=2)
        grads = ((dw, dp), (dw, None), (None, dp))[index % 3]
        found.append((*grads, logits, probabilities, indices, normalize, scoring, scale))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = randn(device, torch.float32, 4, 8)
    return [
        ("logits: got torch.int64", (x.long(), 2, True, "softmax", None, 1, 1, 1.0)),
        ("logits: got shape", (x[0], 2, True, "softmax", None, 1, 1, 1.0)),
        ("k: got 0", (x, 0, True, "softmax", None, 1, 1, 1.0)),
        ("k: got 9, expected 1 to 8", (x, 9, True, "softmax", None, 1, 1, 1.0)),
        ("scoring: got 'relu'", (x, 2, True, "relu", None, 1, 1, 1.0)),
        (r"bias: got shape \[4\]", (x, 2, True, "softmax", x[0, :4].contiguous(), 1, 1, 1.0)),
        ("bias: got torch.float16", (x, 2, True, "softmax", x[0].half(), 1, 1, 1.0)),
        ("groups: got 3", (x, 2, True, "softmax", None, 3, 1, 1.0)),
        ("top_groups: got 5", (x, 2, True, "softmax", None, 4, 5, 1.0)),
        ("top_groups: got 1.*k = 3", (x, 3, True, "softmax", None, 4, 1, 1.0)),
        ("scale: got inf", (x, 2, True, "softmax", None, 1, 1, float("inf"))),
    ]


def floor(logits: torch.Tensor, k: int, *_: Any) -> Floor:
    tokens, experts = logits.shape
    return Floor(logits.nbytes, 4 * tokens * experts + 8 * tokens * k + 4 * experts)


def backward_floor(
    grad_weights: torch.Tensor | None,
    grad_probabilities: torch.Tensor | None,
    logits: torch.Tensor,
    probabilities: torch.Tensor,
    indices: torch.Tensor,
    *_: Any,
) -> Floor:
    tensors = (grad_weights, grad_probabilities, probabilities, indices)
    return Floor(sum(t.nbytes for t in tensors if t is not None), logits.nbytes)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    """The gates of Mixtral, Qwen3-MoE and DeepSeek-V3, of 8192 tokens."""
    bias = randn(device, torch.float32, 256) * 0.01
    return [
        (
            "8192x8 k=2 bfloat16",
            (randn(device, torch.bfloat16, 8192, 8), 2, True, "softmax", None, 1, 1, 1.0),
        ),
        (
            "8192x128 k=8 bfloat16",
            (randn(device, torch.bfloat16, 8192, 128), 8, True, "softmax", None, 1, 1, 1.0),
        ),
        (
            "8192x256 k=8, 4 of 8 groups float32",
            (randn(device, torch.float32, 8192, 256), 8, True, "sigmoid", bias, 8, 4, 2.5),
        ),
    ]


def backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for label, args in benchmarks(device):
        logits, _, normalize, scoring, *_, scale = args
        _, indices, _, p = reference(*args)
        dw = randn(device, torch.float32, *indices.shape)
        found.append((label, (dw, p, logits, p, indices, normalize, scoring, scale)))
    return found


OPS = (
    Op(
        name=NAME,
        schema="(Tensor logits, int k, bool normalize, str scoring, Tensor? bias, int groups, "
        "int top_groups, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
        autograd=Autograd(_setup, _backward),
    ),
    Op(
        name="moe_gate_backward",
        schema="(Tensor? grad_weights, Tensor? grad_probabilities, Tensor logits, "
        "Tensor probabilities, Tensor indices, bool normalize, str scoring, float scale) -> Tensor",
        reference=backward_reference,
        fake=backward_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=backward_cases,
        refused=lambda device: [],
        floor=backward_floor,
        benchmarks=backward_benchmarks,
    ),
)
