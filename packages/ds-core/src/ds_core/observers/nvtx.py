"""NVTX ranges around the phases of each step, which Nsight Systems draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ds_core.errors import DsError
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.engine import Engine

_BEGIN = {
    EventKind.FORWARD_BEGIN: "forward",
    EventKind.BACKWARD_BEGIN: "backward",
    EventKind.UPDATE_BEGIN: "norm",
}
_END = {EventKind.FORWARD, EventKind.BACKWARD, EventKind.REDUCED, EventKind.STEP_END}


class NvtxRanges:
    """Marks "step N" and in it forward, backward, norm and update on the thread that trains.

    Raises DsError if this torch has no NVTX.
    """

    def __init__(self) -> None:
        self._open: list[str] = []
        try:
            torch.cuda.nvtx.mark("ds_core")
        except RuntimeError as error:
            raise DsError(
                f"nvtx.enabled: torch {torch.__version__} has no NVTX ({error}); install a CUDA "
                f'build, or use "trace": {{"enabled": true}}, which runs anywhere'
            ) from error

    def on_event(self, engine: Engine, event: Event) -> None:
        """Open or close a range."""
        if event.kind is EventKind.STEP_BEGIN:
            self._close_to(0)
            self._push(f"step {event.step}")
        elif event.kind in _BEGIN:
            self._close_to(1)
            self._push(_BEGIN[event.kind])
        elif event.kind in _END:
            self._close_to(1)
            if event.kind is EventKind.REDUCED:
                self._push("update")
        if event.kind in (EventKind.STEP_END, EventKind.CLOSE):
            self._close_to(0)

    def _push(self, name: str) -> None:
        torch.cuda.nvtx.range_push(name)
        self._open.append(name)

    def _close_to(self, depth: int) -> None:
        """Also after an error, which leaves ranges open."""
        while len(self._open) > depth:
            torch.cuda.nvtx.range_pop()
            self._open.pop()


def from_config(config: Config) -> NvtxRanges | None:
    """The observer that the section "nvtx" asks for, if it does."""
    from ds_core.observers.sections import NvtxSection, section_of

    return NvtxRanges() if section_of(config, "nvtx", NvtxSection).enabled else None
