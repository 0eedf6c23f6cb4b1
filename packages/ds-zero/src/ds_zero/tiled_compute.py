"""Position-wise parts of a model computed by tiles of the sequence, each again in backward.

An MLP, or a head with its loss, treats every position alike. So a few positions at a time are
enough, and what is large (an MLP's hidden activations, the logits) never exists for all of them.

Source: Bekman et al. 2025, "Arctic Long Sequence Training" (arXiv 2506.13996), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ds_zero.errors import ShardError
from ds_zero.owners import owners_of
from ds_zero.sharded_param import is_sharded

#: What a module that treats positions alike is: hidden, and what goes with it, to an output.
Positionwise = Callable[..., torch.Tensor]
Reduction = Literal["mean", "sum", "none"]


def tiled_mlp(
    module: Positionwise,
    hidden: torch.Tensor,
    *,
    num_tiles: int | None = None,
    dim: int = -2,
    params: Iterable[nn.Parameter] | None = None,
) -> torch.Tensor:
    """`module(hidden)`, computed tile by tile along `dim`, and again so in backward.

    What is saved for backward is `hidden` alone, and what `module` makes on the way exists for one
    tile at a time. Each parameter receives one gradient, the sum over tiles, summed in fp32 or
    better. Dropout draws the same numbers again in backward.

    Args:
        module: treats all positions along `dim` alike; one tensor in, one out, whose size along
            `dim` is the input's. Keeps no statistics.
        hidden: any shape.
        num_tiles: None: positions over the size of the last dimension, rounded up, so that a tile
            is about square; never more than there are positions.
        dim: which dimension holds the positions.
        params: what `module` trains; needed if it is not an `nn.Module`, else found.

    A hook on a parameter (`register_hook`) sees the gradient of each tile as well as their sum.
    Raises ShardError for arguments that make no sense.
    """
    trained = _parameters("tiled_mlp", (module,), params)
    if hidden.dim() == 0 or not -hidden.dim() <= dim < hidden.dim():
        raise ShardError(
            f"tiled_mlp: dim: got {dim}, expected a dimension of hidden, which has shape "
            f"{list(hidden.shape)}"
        )
    size = hidden.shape[dim]
    if num_tiles is None:
        num_tiles = -(-size // max(hidden.shape[-1], 1))
    tiles = _Tiles("tiled_mlp", module, dim % hidden.dim(), _cuts("tiled_mlp", size, num_tiles))
    return _by_tiles(tiles, hidden, trained)


class TiledMLP(nn.Module):
    """A position-wise module that computes as `tiled_mlp` does.

    Wrap the module where the model has it: `block.mlp = TiledMLP(block.mlp, num_tiles=8)`. Its
    parameters are then named `mlp.module.*`.

    Args: as `tiled_mlp` has them.
    """

    def __init__(self, module: nn.Module, num_tiles: int | None = None, dim: int = -2) -> None:
        super().__init__()
        self.module, self.num_tiles, self.dim = module, num_tiles, dim

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `module` does."""
        return tiled_mlp(self.module, hidden, num_tiles=self.num_tiles, dim=self.dim)


def tiled_loss(
    head: Positionwise,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    loss: Positionwise | None = None,
    num_tiles: int | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    params: Iterable[nn.Parameter] | None = None,
) -> torch.Tensor:
    """The loss of `head(hidden)`, whose outputs (logits) exist for one tile of tokens at a time.

    Args:
        head: `[tokens, d]` to logits `[tokens, ...]`: a layer, or a function of one.
        hidden: `[..., d]`.
        targets: `[...]` classes, or `[..., *]` whatever `loss` compares with.
        loss: `(logits, targets)` of a tile to the loss of each of its tokens, `[tokens]`, such as
            `functools.partial(F.cross_entropy, reduction="none")`. None: cross entropy in fp32,
            which for an `nn.Linear` is `ds_core.ops.linear_cross_entropy` where a kernel of it is
            installed: it computes the logits once, not again in backward.
        num_tiles: None: tiles of a quarter of the tokens, 64 to 1024.
        reduction: "mean" over the tokens that count, of all tiles together; "sum"; or "none":
            `[...]`, 0 for ignored tokens.
        ignore_index: targets (if they are whole numbers, one per token) that do not count.
        params: what `head` and `loss` train; needed if `head` is not an `nn.Module`, else found.

    A mean over no tokens is NaN, as torch has it. Raises ShardError for arguments that make no
    sense, and if `loss` does not return one number per token.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ShardError(
            f'tiled_loss: reduction: got {reduction!r}, expected "mean", "sum", "none"'
        )
    shape = hidden.shape[:-1]
    if hidden.dim() < 2 or targets.shape[: len(shape)] != shape:
        raise ShardError(
            f"tiled_loss: targets: got shape {list(targets.shape)}, expected {list(shape)}, a "
            f"target for each position of hidden, which has shape {list(hidden.shape)}"
        )
    from ds_core.ops.linear_cross_entropy import chunk_of  # not needed to import ds_zero

    tokens = shape.numel()
    chunk = chunk_of(tokens, 0) if num_tiles is None else 0
    cuts = _cuts("tiled_loss", tokens, -(-tokens // chunk) if num_tiles is None else num_tiles)
    flat_targets = targets.reshape(tokens, *targets.shape[len(shape) :])
    has_ignored = not targets.is_floating_point() and targets.shape == shape
    is_plain = loss is None and has_ignored and isinstance(head, nn.Linear)
    if is_plain and _has_kernel(head, hidden, reduction):
        return _by_kernel(head, hidden, targets, ignore_index, reduction, cuts[0])
    each = _losses(head, loss or _cross_entropy(ignore_index))
    tiles = _Tiles("tiled_loss", each, 0, cuts, (flat_targets,))
    losses = _by_tiles(
        tiles, hidden.reshape(tokens, -1), _parameters("tiled_loss", (head, loss), params)
    )
    counted = flat_targets != ignore_index if has_ignored else None
    if counted is not None:
        losses = losses.masked_fill(~counted, 0.0)
    if reduction == "none":
        return losses.view(shape)
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (tokens if counted is None else counted.sum())


def _cross_entropy(ignore_index: int) -> Positionwise:
    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, targets.long(), ignore_index=ignore_index, reduction="none")

    return loss


def _losses(head: Positionwise, loss: Positionwise) -> Positionwise:
    """From a tile of hidden states and targets to the losses of its tokens."""

    def each(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = loss(head(hidden), targets)
        if not isinstance(found, torch.Tensor) or found.shape != hidden.shape[:1]:
            got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ShardError(
                f"tiled_loss: loss: returned {got} for {len(hidden)} tokens, expected the loss of "
                f'each, [{len(hidden)}]: use reduction="none" in it, and give the reduction to '
                f"tiled_loss"
            )
        return found

    return each


def _has_kernel(head: Any, hidden: torch.Tensor, reduction: Reduction) -> bool:
    """Whether an installed kernel does cross entropy on this head without all its logits."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if type(head) is not nn.Linear or hidden.dtype not in dtypes:
        return False
    if head.weight.dtype != hidden.dtype or torch.is_autocast_enabled(hidden.device.type):
        return False
    if is_sharded(head.weight) and reduction == "none":
        return False  # its backward needs the weight, and no hook would gather it
    from ds_core import ops

    chosen = ops.choose("linear_cross_entropy", hidden.device.type)
    return chosen.implementation.name != "reference"


def _by_kernel(
    head: Any,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: Reduction,
    chunk: int,
) -> torch.Tensor:
    from ds_core.ops.linear_cross_entropy import linear_cross_entropy

    with _kept_whole(head.parameters()):
        if is_sharded(head.weight):
            with torch.no_grad():
                head(hidden.reshape(-1, hidden.shape[-1])[:0])  # its hooks gather it
        return linear_cross_entropy(
            hidden,
            head.weight,
            targets,
            head.bias,
            ignore_index=ignore_index,
            reduction=reduction,
            chunk=chunk,
        )


# ---------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class _Tiles:
    """What is computed by tiles.

    Attributes:
        caller: whose arguments they are, for messages.
        module: what computes.
        dim: along which dimension of its input.
        sizes: of the tiles.
        beside: further arguments, cut along their first dimension.
    """

    caller: str
    module: Positionwise
    dim: int
    sizes: Sequence[int]
    beside: tuple[torch.Tensor, ...] = ()

    def cut(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tiles of an input or output, or of a gradient of one."""
        return tensor.split(list(self.sizes), dim=self.dim)

    def arguments(self) -> list[list[torch.Tensor]]:
        """For each tile, what `module` gets beside its input."""
        if not self.beside:
            return [[] for _ in self.sizes]
        cut = [tensor.split(list(self.sizes)) for tensor in self.beside]
        return [list(of_tile) for of_tile in zip(*cut, strict=True)]

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output of all tiles, each written to its place."""
        whole: torch.Tensor | None = None
        places: tuple[torch.Tensor, ...] = ()
        for index, (tile, more) in enumerate(zip(self.cut(hidden), self.arguments(), strict=True)):
            # As the whole is: torch's kernels for what has gaps may round otherwise.
            output = self.module(tile.contiguous(), *more)
            self._check(tile, output)
            if whole is None:
                shape = list(output.shape)
                shape[self.dim] = hidden.shape[self.dim]
                whole = output.new_empty(shape)
                places = self.cut(whole)
            places[index].copy_(output)
        assert whole is not None
        return whole

    def _check(self, tile: torch.Tensor, output: Any) -> None:
        size = tile.shape[self.dim]
        fits = isinstance(output, torch.Tensor) and output.dim() > self.dim
        if not fits or output.shape[self.dim] != size:
            got = f"shape {list(output.shape)}" if fits else type(output).__name__
            raise ShardError(
                f"{self.caller}: module: returned {got} for a tile of shape {list(tile.shape)}, "
                f"expected one tensor of size {size} in dimension {self.dim}"
            )


def _by_tiles(tiles: _Tiles, hidden: torch.Tensor, params: list[nn.Parameter]) -> torch.Tensor:
    wanted = [param for param in params if param.requires_grad]
    if len(tiles.sizes) == 1:
        # It is the module itself, and its backward need not compute it again.
        return tiles.module(hidden, *tiles.arguments()[0])
    if not torch.is_grad_enabled() or not (wanted or hidden.requires_grad):
        with torch.no_grad(), _kept_whole(params):
            return tiles.run(hidden)
    found: torch.Tensor = _Recomputed.apply(tiles, params, hidden, *wanted)
    return found


class _Recomputed(torch.autograd.Function):
    """Tiles whose forward saves its input only."""

    @staticmethod
    def forward(
        ctx: Any,
        tiles: _Tiles,
        params: list[nn.Parameter],
        hidden: torch.Tensor,
        *wanted: nn.Parameter,
    ) -> torch.Tensor:
        ctx.tiles, ctx.params, ctx.wanted = tiles, params, wanted
        ctx.save_for_backward(hidden)
        ctx.rng = _rng_states(hidden.device)
        kind = hidden.device.type
        ctx.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        with _kept_whole(params), _autocast(kind, ctx.autocast):
            return tiles.run(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        tiles: _Tiles = ctx.tiles
        for owner, _ in owners_of(ctx.params).values():
            owner.ensure_backward()  # or the backward of the first tile would count as the whole
        sums = _Sums(ctx.wanted)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[2] else None
        places = [None] * len(tiles.sizes) if of_hidden is None else tiles.cut(of_hidden)
        parts = zip(tiles.cut(hidden), tiles.arguments(), tiles.cut(gradient), places, strict=True)
        with _drawing_again(ctx.rng, hidden.device), _autocast(hidden.device.type, ctx.autocast):
            for tile, more, own, place in parts:
                leaf = tile.detach().contiguous().requires_grad_(place is not None)
                with torch.enable_grad():
                    output = tiles.module(leaf, *more)
                inputs = [*ctx.wanted] if place is None else [*ctx.wanted, leaf]
                found = torch.autograd.grad(output, inputs, own, allow_unused=True)
                del output
                sums.add(found[: len(ctx.wanted)])
                if place is not None:
                    place.zero_() if found[-1] is None else place.copy_(found[-1])
        return (None, None, of_hidden, *sums.finished())


class _Sums:
    """Gradients of parameters, summed over tiles in fp32 or better."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self._dtypes = [param.dtype for param in params]
        self._sums: list[torch.Tensor | None] = [None] * len(params)

    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Take in what one tile gives; None for a parameter that it did not use."""
        for index, gradient in enumerate(gradients):
            total = self._sums[index]
            if gradient is None:
                continue
            if total is None:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                self._sums[index] = gradient.to(wide)
            else:
                total.add_(gradient)

    def finished(self) -> list[torch.Tensor | None]:
        """The sums, in the dtypes of their parameters."""
        sums, self._sums = self._sums, []
        return [
            None if total is None else total.to(dtype)
            for total, dtype in zip(sums, self._dtypes, strict=True)
        ]


@contextmanager
def _kept_whole(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """What the first tile gathers at stage 3 stays for the others.

    Except for what is a unit by itself so as not to be whole for long, as `TiledLinear`'s tiles.
    """
    with ExitStack() as stack:
        for owner, units in owners_of(params).values():
            stack.enter_context(owner.keep_units([unit for unit in units if not unit.is_tile]))
        yield


def _autocast(kind: str, state: tuple[bool, torch.dtype]) -> torch.autocast:
    # Without its cache: a weight that was cast where no gradient is wanted would be found in it by
    # whoever wants one.
    return torch.autocast(kind, dtype=state[1], enabled=state[0], cache_enabled=False)


def _rng_states(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What random numbers come next, on the CPU and on the device."""
    own = None
    if device.type != "cpu":
        own = torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), own


@contextmanager
def _drawing_again(
    states: tuple[torch.Tensor, torch.Tensor | None], device: torch.device
) -> Iterator[None]:
    """Draw from `states` inside the block, and afterwards as if nothing had been drawn."""
    before = _rng_states(device)
    _set_rng_states(states, device)
    try:
        yield
    finally:
        _set_rng_states(before, device)


def _set_rng_states(states: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.get_device_module(device).set_rng_state(states[1], device)


def _cuts(caller: str, size: int, num_tiles: int) -> list[int]:
    """Sizes of that many tiles, equal but for the last ones, none of them empty but of nothing."""
    if num_tiles < 1 and size:
        raise ShardError(f"{caller}: num_tiles: got {num_tiles}, expected at least 1")
    each = -(-size // max(num_tiles, 1))
    return [min(each, size - start) for start in range(0, size, each or 1)] or [0]


def _parameters(
    caller: str, parts: Sequence[Any], given: Iterable[nn.Parameter] | None
) -> list[nn.Parameter]:
    """What is trained by the modules among `parts`, each once, unless it is given."""
    if given is not None:
        return list(dict.fromkeys(given))
    if not isinstance(parts[0], nn.Module):
        raise ShardError(
            f"{caller}: params: got None, and {type(parts[0]).__name__} is no nn.Module, so what "
            f"it trains is not known; give a list, which may be empty"
        )
    modules = [part for part in parts if isinstance(part, nn.Module)]
    return list(dict.fromkeys(param for module in modules for param in module.parameters()))
