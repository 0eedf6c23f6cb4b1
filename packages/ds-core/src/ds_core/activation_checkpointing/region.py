"""One checkpointed call: what it draws from named random states, it draws again in backward."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any

import torch


class Region:
    """`fn` as it is handed to a checkpoint, which calls it once, and again for each recomputation.

    The first call notes where named random states (`RngStates`) stand when it first draws from
    them. The later ones draw from there, and leave the states themselves alone, wherever a
    recomputation stops.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._starts: dict[Hashable, torch.Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`fn(*args, **kwargs)`."""
        if self._starts is None:
            self._starts = {}
            now = Pass(self._starts, _present.get())
        else:
            now = Replay(dict(self._starts))
        token = _present.set(now)
        try:
            return self._fn(*args, **kwargs)
        finally:
            _present.reset(token)


class Pass:
    """The first run of a region.

    Args:
        starts: written into: random states as they were at the first draw.
        outer: the run of the region around it.
    """

    def __init__(self, starts: dict[Hashable, torch.Tensor], outer: Pass | None) -> None:
        self._states, self._outer = starts, outer

    def draw_from(self, key: Hashable, own: torch.Tensor) -> torch.Tensor:
        """The state to draw from now, of a named state that stands at `own` outside regions."""
        state = own if self._outer is None else self._outer.draw_from(key, own)
        self._states.setdefault(key, state)
        return state

    def keep(self, key: Hashable, state: torch.Tensor) -> bool:
        """Note the state after drawing. Returns whether it goes on here, and not outside."""
        return self._outer is not None and self._outer.keep(key, state)


class Replay(Pass):
    """A recomputation of a region: it has copies of the states, and nothing outside changes."""

    def __init__(self, states: dict[Hashable, torch.Tensor]) -> None:
        super().__init__(states, None)

    def keep(self, key: Hashable, state: torch.Tensor) -> bool:
        """Go on from `state` in this recomputation."""
        self._states[key] = state
        return True

    def draw_from(self, key: Hashable, own: torch.Tensor) -> torch.Tensor:
        """The state that the first run drew from at this place."""
        return self._states.get(key, own)


_present: ContextVar[Pass | None] = ContextVar("checkpointed region", default=None)


def present() -> Pass | None:
    """The run of a region that this thread is in, the innermost; None outside of all."""
    return _present.get()
