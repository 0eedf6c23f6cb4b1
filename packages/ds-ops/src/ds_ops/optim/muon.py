"""Muon with a fused step for the parameters that are no hidden matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch.optim import Optimizer

from ds_core import optim
from ds_ops.optim.adam import FusedAdam


class Muon(optim.Muon):
    """`ds_core.optim.Muon` whose AdamW is `FusedAdam`; arguments and arithmetic are its own.

    `step` also takes gradients in another format, a gradient scale and low-precision copies, as
    `FusedAdam.step` does.
    """

    _rest_class: ClassVar[Callable[..., Optimizer]] = FusedAdam
    step_options: ClassVar[frozenset[str]] = frozenset({"gradients", "copies", "grad_scale"})
    ops = FusedAdam.ops

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but a state of AdamW keeps its format, as `FusedAdam`'s does."""
        super().load_state_dict(state_dict)
        pairs = zip(state_dict["param_groups"], self.param_groups, strict=True)
        others = [(saved, own) for saved, own in pairs if not self.is_whole(own)]
        if isinstance(self._rest, FusedAdam):
            self._rest.state = self.state
            self._rest.keep_formats(state_dict["state"], others)
