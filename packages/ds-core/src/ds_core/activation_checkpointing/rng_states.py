"""Random states by name, for parts of a model that must draw alike, or apart, on several ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ds_core import accelerator, comm
from ds_core.activation_checkpointing.region import present
from ds_core.errors import DsError

#: The state that ranks of one tensor-parallel group do not share.
TENSOR_PARALLEL = "tensor-parallel"


class RngStates:
    """States of one device's random generator, each used inside `fork(name)` only.

    Ranks that share a tensor draw the same dropout for it from the default state; for what each
    holds a part of, they draw apart from a named one. Inside `checkpoint` and in blocks that
    `checkpoint_blocks` has changed, both are drawn alike when they are computed again.

    Args:
        device: whose default generator is used; default: the current accelerator, or the CPU.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = accelerator.current().device() if device is None else torch.device(device)
        self._states: dict[str, torch.Tensor] = {}
        self._seeds: dict[int, str] = {}

    @classmethod
    def for_tensor_parallel(
        cls, seed: int, tp_rank: int, device: torch.device | str | None = None
    ) -> RngStates:
        """Seed the default state with `seed`, and "tensor-parallel" differently on each rank.

        tp_rank: this process's rank along the "tp" axis.
        """
        states = cls(device)
        torch.manual_seed(seed)
        states.add(TENSOR_PARALLEL, seed + 2718 + tp_rank)
        return states

    def add(self, name: str, seed: int) -> None:
        """Begin a state. Raises DsError if its name or its seed is in use."""
        if name in self._states:
            raise DsError(f"RngStates.add: there is a state {name!r} already; use another name")
        if seed in self._seeds:
            raise DsError(
                f"RngStates.add: state {self._seeds[seed]!r} has seed {seed} too, so both would "
                f"draw the same numbers; use another seed"
            )
        self._states[name] = torch.Generator(self.device).manual_seed(seed).get_state()
        self._seeds[seed] = name

    @property
    def names(self) -> tuple[str, ...]:
        """The states that there are."""
        return tuple(self._states)

    @contextmanager
    def fork(self, name: str = TENSOR_PARALLEL) -> Iterator[None]:
        """Draw from the state `name` inside the block; it goes on from there the next time.

        Raises DsError if there is no such state.
        """
        if name not in self._states:
            known = ", ".join(self._states) or "none"
            raise DsError(f"RngStates.fork: no state is called {name!r}; there is {known}; add it")
        region = present()
        before, own = self._get(), self._states[name]
        self._set(own if region is None else region.draw_from((self, name), own))
        try:
            yield
        finally:
            after = self._get()
            if region is None or not region.keep((self, name), after):
                self._states[name] = after
            self._set(before)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The states by name, for a checkpoint."""
        return {name: state.clone() for name, state in self._states.items()}

    def load_state_dict(self, states: Mapping[str, torch.Tensor]) -> None:
        """Go on from `state_dict()`. Raises DsError if the names differ."""
        if set(states) != set(self._states):
            raise DsError(
                f"RngStates.load_state_dict: got states {sorted(states)}, expected "
                f"{sorted(self._states)}; add the same ones before loading"
            )
        self._states = {name: state.clone() for name, state in states.items()}

    def _get(self) -> torch.Tensor:
        if self.device.type == "cpu":
            return torch.get_rng_state()
        state: torch.Tensor = torch.get_device_module(self.device).get_rng_state(self.device)
        return state

    def _set(self, state: torch.Tensor) -> None:
        if self.device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(self.device).set_rng_state(state, self.device)


def model_parallel_seed(
    seed: int, group: comm.Group, device: torch.device | str | None = None
) -> RngStates:
    """Seed this process for a model that is split over `group`, and return the named states.

    What is drawn by default is then the same on all ranks of the group, and inside `fork()` of the
    states different on each. Data-parallel ranks that shall draw apart give another seed.

    Args:
        seed: the same on all ranks of the group.
        group: such as `mesh.group("tp")`.
        device: see `RngStates`.

    Raises DsError, on all ranks, if their seeds differ. Collective.
    """
    seeds = comm.all_gather_object(seed, group, caller="model_parallel_seed")
    if len(set(seeds)) > 1:
        told = ", ".join(f"rank {r}: {s}" for r, s in zip(group.ranks, seeds, strict=True))
        raise DsError(
            f"model_parallel_seed: seed: ranks of the group {group.name!r} differ ({told}), so "
            f"they would drop different elements of what they share; give the same on all of them"
        )
    return RngStates.for_tensor_parallel(seed, group.rank, device)
