"""Random layer-wise token dropping: middle layers see a random part of the tokens.

Each chosen layer draws its own tokens; the others go around it and are put back in their places.
The part grows with the steps until it is everything.

Source: Yao et al. 2022, "Random-LTD: Random and Layerwise Token Dropping" (2211.11586).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_core.data.schedule import Schedule
from ds_core.efficiency.calls import change_call, repeated_blocks
from ds_core.errors import ConfigError, DsError
from ds_core.seams.observer import Event, EventKind

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.engine import Engine


class RandomLTD:
    """The token dropping of a model's layers, made by `convert_to_random_ltd`.

    Attributes:
        num_tokens: how many tokens of a sequence the layers see in training from now on; sequences
            that are no longer pass whole. None: all.
        layers: the chosen ones.
    """

    def __init__(self, layers: Sequence[nn.Module], restores: Sequence[Callable[[], None]]) -> None:
        self.layers, self._restores = tuple(layers), list(restores)
        self.num_tokens: int | None = None

    def remove(self) -> None:
        """Make the layers what they were."""
        while self._restores:
            self._restores.pop()()


def convert_to_random_ltd(
    model: nn.Module,
    layers: type[nn.Module] | Iterable[str],
    *,
    keeps_ends: bool = True,
    mask_name: str | None = None,
    batch_first: bool = True,
) -> RandomLTD:
    """Let layers of a model see a random part of the tokens in training.

    A layer is called with hidden states `[b, t, d]` first and returns a tensor of that shape, alone
    or first of a tuple. What else it is called with is cut to the same tokens wherever it has one
    place per token: tensors `[b, t, ...]` and `[1, t, ...]`, tables `[t, ...]`, and masks
    (booleans, or named so) along queries and keys. Each sample draws its own tokens, unless an
    argument is a table over positions, such as rotary angles, that all samples share: then they
    share the draw too. Tokens keep their order. Parameters, their names and checkpoints are
    unchanged; evaluation sees all tokens. The draw is by torch's generator of the tensor's device,
    as dropout's, so activation checkpointing repeats it.

    Args:
        model: changed in place.
        layers: a class, or qualified names.
        keeps_ends: with a class, whether its first and last module see all tokens, as the paper
            has it.
        mask_name: an argument that is a mask though its name has no "mask" in it.
        batch_first: False for hidden states `[t, b, d]`.

    Returns the handle whose `num_tokens` is to be set; see `RandomLTDObserver`.
    Raises DsError if nothing is named so.
    """
    if isinstance(layers, type):
        found = [module for module in model.modules() if isinstance(module, layers)]
        chosen = found[1:-1] if keeps_ends else found
        wanted = layers.__name__
    else:
        names = list(layers)
        modules = dict(model.named_modules())
        if missing := [name for name in names if name not in modules]:
            raise DsError(f"convert_to_random_ltd: {type(model).__name__} has no {missing[0]!r}")
        chosen, wanted = [modules[name] for name in names], ", ".join(names)
    if not chosen:
        raise DsError(
            f"convert_to_random_ltd: {type(model).__name__} has no layer of {wanted or 'no name'}"
            + (" between a first and a last one" if isinstance(layers, type) and keeps_ends else "")
        )
    return _convert(chosen, mask_name=mask_name, batch_first=batch_first)


class RandomLTDObserver:
    """Sets, as each step of an engine begins, how many tokens the layers see.

    Args:
        schedule: tokens at each optimizer step, counted from 1.
        find: makes the handle from the engine's model, when the engine starts.
    """

    def __init__(self, schedule: Schedule, find: Callable[[nn.Module], RandomLTD]) -> None:
        self.schedule, self._find = schedule, find
        self.handle: RandomLTD | None = None

    def on_event(self, engine: Engine, event: Event) -> None:
        """Convert at the start, follow the schedule, and restore the layers at the end."""
        if event.kind is EventKind.START:
            self.handle = self._find(engine.module)
        elif event.kind is EventKind.STEP_BEGIN and self.handle is not None:
            self.handle.num_tokens = int(self.schedule(engine.global_step + 1))
        elif event.kind is EventKind.CLOSE and self.handle is not None:
            self.handle.remove()


def random_ltd_observer(config: Config) -> RandomLTDObserver | None:
    """The token dropping that a config asks for, or None."""
    from ds_core.data.config import DataEfficiencySection

    section = config.section("data_efficiency")
    if not isinstance(section, DataEfficiencySection):
        return None
    rule = section.data_routing.random_ltd
    if not rule.enabled:
        return None

    def find(model: nn.Module) -> RandomLTD:
        try:
            blocks = repeated_blocks(model, rule.total_layer_num)
        except DsError as error:
            raise ConfigError(
                f"data_efficiency.data_routing.random_ltd.total_layer_num: {error}"
            ) from error
        return _convert(
            [blocks[index] for index in sorted(rule.random_ltd_layer_id)],
            mask_name=rule.model_mask_name,
            batch_first=rule.hidden_state_order == "batch_seq_dim",
        )

    return RandomLTDObserver(rule.schedule(), find)


def _convert(layers: Sequence[nn.Module], *, mask_name: str | None, batch_first: bool) -> RandomLTD:
    handle = RandomLTD(layers, [])
    for layer in layers:
        routed = _Routed(handle, layer, mask_name, 1 if batch_first else 0)
        handle._restores.append(change_call(layer, routed))
    return handle


class _Routed:
    """What a chosen layer is called through."""

    def __init__(
        self, handle: RandomLTD, layer: nn.Module, mask_name: str | None, token_dim: int
    ) -> None:
        self._handle, self._layer, self._token_dim = handle, layer, token_dim
        self._mask_name = mask_name
        self._names = list(inspect.signature(layer.forward).parameters)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kept = self._handle.num_tokens
        if kept is None or not self._layer.training:
            return call(*args, **kwargs)
        given = [*args, *kwargs.values()]
        hidden = args[0] if args else kwargs.get(self._names[0])
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
            raise DsError(
                f"random-LTD: {type(self._layer).__name__} is called with {type(hidden).__name__} "
                f"first, expected hidden states of three dimensions"
            )
        if kept >= hidden.shape[self._token_dim]:
            return call(*args, **kwargs)
        drawn = _Draw.of(hidden, kept, self._token_dim, given)
        names = [*self._names, *[""] * len(args)]  # more than there are names: *args
        cut_args = [self._cut(value, name, drawn) for value, name in zip(args, names, strict=False)]
        cut_kwargs = {name: self._cut(value, name, drawn) for name, value in kwargs.items()}
        output = call(*cut_args, **cut_kwargs)
        if isinstance(output, tuple):
            return (drawn.put_back(hidden, output[0]), *output[1:])
        return drawn.put_back(hidden, output)

    def _cut(self, value: Any, name: str, drawn: _Draw) -> Any:
        if isinstance(value, torch.Tensor):
            is_mask = value.dtype is torch.bool or "mask" in name or name == self._mask_name
            return drawn.cut_mask(value) if is_mask else drawn.cut(value)
        if isinstance(value, Mapping):
            return {key: self._cut(item, str(key), drawn) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._cut(item, name, drawn) for item in value)
        return value


@dataclass(frozen=True)
class _Draw:
    """The tokens of one call.

    Attributes:
        index: their positions, ascending, `[b, r]`; `[r]` if all samples share them.
        size: tokens of a whole sequence.
        token_dim: dimension of the tokens in hidden states; the batch is the other of 0 and 1.
    """

    index: torch.Tensor
    size: int
    token_dim: int

    @classmethod
    def of(cls, hidden: torch.Tensor, kept: int, token_dim: int, given: list[Any]) -> _Draw:
        size, batch = hidden.shape[token_dim], hidden.shape[1 - token_dim]
        shared = any(
            _is_table(value, batch, size, token_dim) for value in given if value is not hidden
        )
        shape = (size,) if shared else (batch, size)
        chosen = torch.rand(shape, device=hidden.device).topk(kept, dim=-1).indices
        return cls(chosen.sort(dim=-1).values, size, token_dim)

    def cut(self, value: torch.Tensor) -> torch.Tensor:
        """The drawn tokens of a tensor with one place per token; any other tensor as it is."""
        if self._has_samples(value):
            return self._gather(value, self.token_dim, 1 - self.token_dim)
        if self.index.dim() == 1 and value.dim() and value.shape[0] == self.size:
            return value.index_select(0, self.index)
        return value

    def cut_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask for the drawn tokens: `[b, t]`, or `[..., t, t]` of queries and keys."""
        if mask.dim() < 2:
            return self.cut(mask)
        is_square = mask.shape[-2:] == (self.size, self.size)
        if mask.dim() == 2 and not (is_square and self.index.dim() == 1):
            return self._gather(mask, 1, 0) if mask.shape[1] == self.size else mask
        for dim in (mask.dim() - 2, mask.dim() - 1):
            if mask.shape[dim] == self.size:
                mask = self._gather(mask, dim, 0)
        return mask

    def put_back(self, hidden: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """The hidden states with the drawn tokens replaced."""
        part = part.to(hidden.dtype)
        if self.index.dim() == 1:
            return hidden.index_copy(self.token_dim, self.index, part)
        return hidden.scatter(self.token_dim, self._index_for(part, self.token_dim), part)

    def _has_samples(self, value: torch.Tensor) -> bool:
        if value.dim() < 2 or value.shape[self.token_dim] != self.size:
            return False
        samples = self.index.shape[0] if self.index.dim() == 2 else value.shape[1 - self.token_dim]
        return value.shape[1 - self.token_dim] in (1, samples)

    def _gather(self, value: torch.Tensor, dim: int, batch_dim: int) -> torch.Tensor:
        if self.index.dim() == 1:
            return value.index_select(dim, self.index)
        if value.shape[batch_dim] == 1:
            shape = list(value.shape)
            shape[batch_dim] = self.index.shape[0]
            value = value.expand(shape)
        return value.gather(dim, self._index_for(value, dim, batch_dim))

    def _index_for(
        self, value: torch.Tensor, dim: int, batch_dim: int | None = None
    ) -> torch.Tensor:
        """The index in the shape that gather and scatter want for a tensor like `value`."""
        batch_dim = 1 - dim if batch_dim is None else batch_dim
        index = self.index if batch_dim < dim else self.index.T
        shape = [1] * value.dim()
        shape[batch_dim], shape[dim] = self.index.shape
        full = list(value.shape)
        full[dim] = self.index.shape[1]
        return index.reshape(shape).expand(full)


def _is_table(value: Any, batch: int, size: int, token_dim: int) -> bool:
    """Whether an argument has one place per token, and none per sample."""
    if isinstance(value, Mapping):
        return any(_is_table(item, batch, size, token_dim) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_is_table(item, batch, size, token_dim) for item in value)
    if not isinstance(value, torch.Tensor) or not value.dim() or value.shape[0] != size:
        return False
    per_sample = value.dim() >= 2 and token_dim == 0 and value.shape[1] in (1, batch)
    return not per_sample and not (value.dim() >= 2 and size == batch and value.shape[1] == size)
