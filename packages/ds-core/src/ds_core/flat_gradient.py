"""Gradients of several parameters in one flat buffer, each written as autograd hands it over."""

from __future__ import annotations

import torch

from ds_core.flat import FlatLayout


class FlatGradient:
    """A flat buffer into which gradients are written once, or added.

    Args:
        layout: where each parameter's gradient lies.
        dtype, device: of the buffer.
        transient: whether its memory exists only from the first gradient until `release`.

    Attributes:
        flat: the buffer, `[layout.numel]`; without memory while it is released.
        used: which parameters received a gradient since `forget`.
    """

    def __init__(
        self,
        layout: FlatLayout,
        dtype: torch.dtype,
        device: torch.device,
        *,
        transient: bool = False,
    ) -> None:
        self.layout, self.transient = layout, transient
        make = torch.empty if transient else torch.zeros
        self.flat = make(layout.numel, dtype=dtype, device=device)
        # Made once: slicing anew costs more than writing a small gradient.
        self.views = [self.flat[slot.offset : slot.end].view(slot.shape) for slot in layout.slots]
        self._gaps = [self.flat[start:stop] for start, stop in layout.gaps()]
        self._bytes = self.flat.untyped_storage().size()
        self.used = [False] * len(self.views)
        # Places that hold nothing yet: a gradient is written there, not added.
        self._fresh = [True] * len(self.views)
        if transient:
            self.flat.untyped_storage().resize_(0)
        self._present = not transient

    def write(self, position: int, gradient: torch.Tensor, factor: float) -> None:
        """Write (or add) `factor * gradient` of the parameter at `position`."""
        if not self._present:
            self._allocate()
        if gradient.layout is not torch.strided:
            gradient = gradient.to_dense()
        if self._fresh[position]:
            torch.mul(gradient, factor, out=self.views[position])
            self._fresh[position] = False
            self.used[position] = True
        else:
            self.views[position].add_(gradient, alpha=factor)
            self.used[position] = True

    def complete(self) -> torch.Tensor:
        """The buffer, with zeros where no gradient came."""
        if not self._present:
            self._allocate()
        for position, fresh in enumerate(self._fresh):
            if fresh:
                self.views[position].zero_()
        return self.flat

    def keep(self) -> None:
        """What the buffer holds stays: later gradients are added to it."""
        self._fresh = [False] * len(self.views)

    def release(self) -> None:
        """What the buffer holds is not needed: later gradients overwrite it."""
        self._fresh = [True] * len(self.views)
        if self.transient and self._present:
            self.flat.untyped_storage().resize_(0)
            self._present = False

    def forget(self) -> None:
        """Drop all gradients, and that any came."""
        self.used = [False] * len(self.views)
        self.release()

    def _allocate(self) -> None:
        self.flat.untyped_storage().resize_(self._bytes)
        self._present = True
        for gap in self._gaps:
            gap.zero_()
