"""A BERT layer made of these ops: attention, two normalizations, two linear layers.

Source: Devlin et al. 2019 (BERT); Xiong et al. 2020, figure 1 (normalization before or after).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ds_core.errors import ConfigError, OpError
from ds_core.ops.arguments import expect, expect_tensors
from ds_core.ops.bias_activation import bias_activation
from ds_core.ops.layer_norm import layer_norm


@dataclass
class TransformerLayerConfig:
    """What a `TransformerLayer` is made of, by the names that DeepSpeedTransformerConfig has.

    Sizes of -1 have to be set before a layer is made.

    Attributes:
        batch_size: not used: any batch works.
        hidden_size, heads: width of the layer, a multiple of the number of its heads.
        intermediate_size: of the feed-forward part; -1: four times hidden_size.
        attn_dropout_ratio: of attention weights; below 0: none.
        hidden_dropout_ratio: of what attention and the feed-forward part give; below 0: none.
        num_hidden_layers: of the model, for adjust_init_range.
        initializer_range: standard deviation of the weights at the start.
        layer_norm_eps: added to the variance.
        local_rank: not used: the layer is where torch makes it, `.to(device)` moves it.
        seed: not used: dropout takes torch's random numbers, which `torch.manual_seed` seeds.
        fp16: not used: the layer computes in the dtype of its weights; `.half()` changes it.
        pre_layer_norm: normalize what goes into attention and the feed-forward part, else what
            comes out of them, with the residual added.
        normalize_invertible: what a normalization gives to a linear layer is not kept but computed
            again in the backward from what went in, which is kept. (The original keeps the
            result, and goes back from it, which loses digits; the memory is the same.)
        gelu_checkpoint: what the activation gives is not kept but computed again.
        adjust_init_range: the weights before a residual start smaller, by `sqrt(2 layers)`.
        attn_dropout_checkpoint: attention is computed again in the backward, with the same
            dropout, so that nothing of it is kept but queries, keys and values.
        stochastic_mode: not used. In the original a faster kernel whose results differ from run
            to run; none of ours do.
        return_tuple: the layer returns `(hidden_states,)`.
        training: whether the layer begins in training mode; `.train()` and `.eval()` change it.
    """

    batch_size: int = -1
    hidden_size: int = -1
    intermediate_size: int = -1
    heads: int = -1
    attn_dropout_ratio: float = -1
    hidden_dropout_ratio: float = -1
    num_hidden_layers: int = -1
    initializer_range: float = -1
    layer_norm_eps: float = 1e-12
    local_rank: int = -1
    seed: int = -1
    fp16: bool = False
    pre_layer_norm: bool = True
    normalize_invertible: bool = False
    gelu_checkpoint: bool = False
    adjust_init_range: bool = True
    attn_dropout_checkpoint: bool = False
    stochastic_mode: bool = False
    return_tuple: bool = False
    training: bool = True

    def __post_init__(self) -> None:
        if self.intermediate_size <= 0 < self.hidden_size:
            self.intermediate_size = 4 * self.hidden_size

    @classmethod
    def from_dict(cls, json_object: Mapping[str, Any]) -> TransformerLayerConfig:
        """The config of some attributes by name. Raises ConfigError for a name that is none."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in json_object:
            if key not in known:
                raise ConfigError(f"{cls.__name__}: there is no {key!r}; there are {known}")
        return cls(**json_object)

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> TransformerLayerConfig:
        """The config that a JSON file has, in UTF-8, UTF-16 or UTF-32."""
        found: dict[str, Any] = json.loads(Path(json_file).read_bytes())
        return cls.from_dict(found)

    def check(self) -> None:
        """Raise ConfigError, naming the attribute, unless a layer can be made of this."""
        for name in ("hidden_size", "heads", "intermediate_size"):
            self._expect(getattr(self, name) > 0, name, "1 or more")
        self._expect(self.hidden_size % self.heads == 0, "hidden_size", "a multiple of heads")
        for name in ("attn_dropout_ratio", "hidden_dropout_ratio"):
            self._expect(getattr(self, name) < 1, name, "less than 1")
        self._expect(self.initializer_range >= 0, "initializer_range", "0 or more, such as 0.02")
        self._expect(self.layer_norm_eps >= 0, "layer_norm_eps", "0 or more")
        known = self.num_hidden_layers > 0 or not self.adjust_init_range
        self._expect(known, "num_hidden_layers", "1 or more, for adjust_init_range")

    def _expect(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            got = getattr(self, name)
            raise ConfigError(f"{type(self).__name__}: {name}: got {got}, expected {expected}")


class TransformerLayer(torch.nn.Module):
    """A layer of BERT's encoder, with the parameters of DeepSpeedTransformerLayer.

    With h hidden_size and i intermediate_size: `attn_qkvw [3 h, h]`, `attn_qkvb [3 h]` (queries,
    keys, values), `attn_ow [h, h]`, `attn_ob [h]`, `attn_nw`, `attn_nb [h]` (the normalization
    between attention and feed-forward part), `inter_w [i, h]`, `inter_b [i]`, `output_w [h, i]`,
    `output_b [h]`, `norm_w`, `norm_b [h]` (the first normalization if pre_layer_norm, else the
    last). The activation is GELU in its approximation by tanh.

    Args:
        config: sizes and options; it is kept, not copied.
        initial_weights, initial_biases: of queries, keys, values, attention's output,
            normalization, feed-forward part (two) and the other normalization, eight each, in
            place of random ones. Biases without weights are refused, weights alone are taken.

    Raises ConfigError for sizes that do not fit.
    """

    def __init__(
        self,
        config: TransformerLayerConfig,
        initial_weights: Sequence[torch.Tensor] | None = None,
        initial_biases: Sequence[torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, TransformerLayerConfig):
            told = type(config).__name__
            raise ConfigError(
                f"TransformerLayer: config: got {told}, expected a TransformerLayerConfig"
            )
        config.check()
        self.config = config
        hidden, inter = config.hidden_size, config.intermediate_size
        self.attn_qkvw = torch.nn.Parameter(torch.empty(3 * hidden, hidden))
        self.attn_qkvb = torch.nn.Parameter(torch.empty(3 * hidden))
        self.attn_ow = torch.nn.Parameter(torch.empty(hidden, hidden))
        self.attn_ob = torch.nn.Parameter(torch.empty(hidden))
        self.attn_nw = torch.nn.Parameter(torch.empty(hidden))
        self.attn_nb = torch.nn.Parameter(torch.empty(hidden))
        self.inter_w = torch.nn.Parameter(torch.empty(inter, hidden))
        self.inter_b = torch.nn.Parameter(torch.empty(inter))
        self.output_w = torch.nn.Parameter(torch.empty(hidden, inter))
        self.output_b = torch.nn.Parameter(torch.empty(hidden))
        self.norm_w = torch.nn.Parameter(torch.empty(hidden))
        self.norm_b = torch.nn.Parameter(torch.empty(hidden))
        self.init_transformer_weights(config.adjust_init_range)
        self._take("initial_weights", initial_weights, _WEIGHTS)
        self._take("initial_biases", initial_biases, _BIASES)
        self.train(config.training)

    @torch.no_grad()
    def init_transformer_weights(self, adjust_init_range: bool = False) -> None:
        """Start again: normal weights, biases of 0, normalizations that change nothing.

        adjust_init_range: attn_ow and output_w smaller by `sqrt(2 num_hidden_layers)`, on every
        rank alike.
        """
        config = self.config
        spread = config.initializer_range
        before = spread / math.sqrt(2.0 * config.num_hidden_layers) if adjust_init_range else spread
        for weight in (self.attn_qkvw, self.inter_w):
            weight.normal_(0.0, spread)
        for weight in (self.attn_ow, self.output_w):
            weight.normal_(0.0, before)
        for norm in (self.attn_nw, self.norm_w):
            norm.fill_(1.0)
        for bias in (self.attn_qkvb, self.attn_ob, self.attn_nb, self.inter_b, self.output_b):
            bias.zero_()
        self.norm_b.zero_()

    @torch.no_grad()
    def _take(
        self, argument: str, given: Sequence[torch.Tensor] | None, names: tuple[str, ...]
    ) -> None:
        """Copy eight tensors, the first three of which are one parameter."""
        if given is None:
            return
        if len(given) != 8:
            raise ConfigError(f"TransformerLayer: {argument}: got {len(given)}, expected 8 tensors")
        for name, value in zip(names, (torch.cat(tuple(given[:3])), *given[3:]), strict=True):
            getattr(self, name).copy_(value)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        head_mask: None = None,
        layer_head_mask: None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        past_key_value: None = None,
        output_attentions: bool = False,
        grads: None = None,
    ) -> torch.Tensor | tuple[torch.Tensor]:
        """The layer's output, `[batch, length, hidden_size]`; a tuple of it with return_tuple.

        Args:
            hidden_states: `[batch, length, hidden_size]`, of the weights' dtype (under
                torch.autocast of any); any length.
            attention_mask: what can be broadcast to `[batch, heads, length, length]`, such as
                `[batch, 1, 1, length]`: added to the scores (0, or -10000 for keys that are not to
                be seen), or bool, False for those.
            head_mask, layer_head_mask, encoder_hidden_states, encoder_attention_mask,
                past_key_value, output_attentions, grads: there for callers that pass them empty;
                other values are an OpError, for the layer does not have what they ask for.

        Raises OpError for shapes or dtypes that do not fit.
        """
        _expect_empty(
            head_mask=head_mask,
            layer_head_mask=layer_head_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            grads=grads,
        )
        self._check(hidden_states, attention_mask)
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask.to(hidden_states.dtype)
        forward = self._normalized_before if self.config.pre_layer_norm else self._normalized_after
        found = forward(hidden_states, attention_mask)
        return (found,) if self.config.return_tuple else found

    def _check(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        op, hidden, dtype = "TransformerLayer", self.config.hidden_size, self.attn_qkvw.dtype
        expect_tensors(op, hidden_states=x)
        fits = x.dim() == 3 and x.shape[2] == hidden
        shape = f"shape {list(x.shape)}"
        expect(fits, op, "hidden_states", shape, f"[batch, length, {hidden}]")
        if not torch.is_autocast_enabled(x.device.type):
            expect(x.dtype == dtype, op, "hidden_states", x.dtype, f"{dtype}, as the weights")
        if mask is None:
            return
        added = mask.is_floating_point() or mask.dtype == torch.bool
        wanted = "floats, which are added to the scores, or bool"
        expect(added, op, "attention_mask", mask.dtype, wanted)
        scores = (len(x), self.config.heads, x.shape[1], x.shape[1])
        pairs = zip(reversed(mask.shape), reversed(scores), strict=False)
        fits = mask.dim() <= 4 and all(own in (1, size) for own, size in pairs)
        shape = f"shape {list(mask.shape)}"
        expect(fits, op, "attention_mask", shape, f"what can be broadcast to {list(scores)}")

    def _normalized_before(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        invertible = self.config.normalize_invertible
        mixed = self._attention(_kept(invertible, self._first, x), mask)
        if invertible:
            x = x + mixed
            inter = _kept(True, self._between, x)
        else:
            normal, x = self._norm_between(mixed, residual=x)
            inter = F.linear(normal, self.inter_w)
        return x + self._feed_forward(inter)

    def _normalized_after(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        mixed = self._attention(F.linear(x, self.attn_qkvw, self.attn_qkvb), mask)
        if self.config.normalize_invertible:
            normal, inter = _kept(True, self._between_both, x + mixed)
        else:
            normal, _ = self._norm_between(mixed, residual=x)
            inter = F.linear(normal, self.inter_w)
        more = self._feed_forward(inter).to(normal.dtype)
        found, _ = layer_norm(
            more, self.norm_w, self.norm_b, self.config.layer_norm_eps, residual=normal
        )
        return found

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        normal = layer_norm(x, self.norm_w, self.norm_b, self.config.layer_norm_eps)
        return F.linear(normal, self.attn_qkvw, self.attn_qkvb)

    def _norm_between(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        eps = self.config.layer_norm_eps
        # Under autocast products are narrower than what they are added to.
        x = x.to(residual.dtype)
        return layer_norm(x, self.attn_nw, self.attn_nb, eps, residual=residual)

    def _between(self, x: torch.Tensor) -> torch.Tensor:
        return self._between_both(x)[1]

    def _between_both(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normal = layer_norm(x, self.attn_nw, self.attn_nb, self.config.layer_norm_eps)
        return normal, F.linear(normal, self.inter_w)

    def _attention(self, qkv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What attention adds to the residual."""
        again, random = self.config.attn_dropout_checkpoint, self.config.attn_dropout_ratio > 0
        mixed = _kept(again, self._mixed, qkv, mask, random=random and self.training)
        return self._dropped(F.linear(mixed, self.attn_ow, self.attn_ob))

    def _mixed(self, qkv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, length, _ = qkv.shape
        q, k, v = qkv.view(batch, length, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        drop = max(self.config.attn_dropout_ratio, 0.0) if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        return mixed.transpose(1, 2).reshape(batch, length, -1)

    def _feed_forward(self, inter: torch.Tensor) -> torch.Tensor:
        """What the feed-forward part adds to the residual."""
        return self._dropped(_kept(self.config.gelu_checkpoint, self._activated, inter))

    def _activated(self, inter: torch.Tensor) -> torch.Tensor:
        y = bias_activation(inter, self.inter_b.to(inter.dtype), "gelu_tanh")
        return F.linear(y, self.output_w, self.output_b)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, max(self.config.hidden_dropout_ratio, 0.0), self.training)


#: What `initial_weights` and `initial_biases` are of; queries, keys and values as one.
_WEIGHTS = ("attn_qkvw", "attn_ow", "attn_nw", "inter_w", "output_w", "norm_w")
_BIASES = ("attn_qkvb", "attn_ob", "attn_nb", "inter_b", "output_b", "norm_b")


def _kept(only_inputs: bool, function: Callable[..., Any], *args: Any, random: bool = False) -> Any:
    """`function(*args)`; if only_inputs, what it keeps for its gradient is computed again.

    The computation stops at the last tensor that is needed: of a linear layer at the end nothing
    is multiplied again.
    """
    if only_inputs and torch.is_grad_enabled():
        # Random numbers are set back only where there are some: it reads the device's state.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random)
    return function(*args)


def _expect_empty(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and value is not False:
            raise OpError(
                f"TransformerLayer: {name}: got {type(value).__name__}, expected None: the layer "
                "is an encoder's, without it; use torch.nn.functional for another kind of layer"
            )
