"""The mean of a figure over the data-parallel ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ds_core import comm

if TYPE_CHECKING:
    from ds_core.engine import Engine


class RankMean:
    """Averages a scalar that some ranks may not have."""

    def of(self, engine: Engine, value: torch.Tensor | None) -> torch.Tensor | None:
        """Mean over the ranks that have one, on the engine's device; None if none has.

        Collective over the axis "dp": all its ranks call at the same step. Sends 8 bytes.
        """
        pair = torch.zeros(2, device=engine.device)
        if value is not None:
            pair[0], pair[1] = value.to(engine.device), 1.0
        comm.all_reduce(pair, engine.mesh.group("dp"), caller="loss over ranks")
        return None if float(pair[1]) == 0.0 else pair[0] / pair[1]
