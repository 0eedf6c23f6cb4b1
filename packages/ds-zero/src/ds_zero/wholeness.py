"""Whether all that the ranks hold belongs to one step, and the errors that say that it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, TypeVar

import torch

from ds_core import comm
from ds_zero.errors import ShardError, TornShardError

T = TypeVar("T")


class Source(Protocol):
    """What an error can leave between two steps."""

    @property
    def torn(self) -> str | None:
        """What the error left; None if there was none."""


class Trouble(NamedTuple):
    """Why a rank cannot go on.

    Attributes:
        told: in words.
        is_torn: whether what it holds belongs to no one step any more.
    """

    told: str
    is_torn: bool


class Wholeness:
    """Whether what this rank holds belongs to one step.

    Args:
        sources: who may have met an error.
        device: where the ranks' messages are.
    """

    def __init__(self, sources: list[Source], device: torch.device) -> None:
        self._sources, self._device = sources, device
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """Why it does not; None if it does. The first reason counts."""
        for source in self._sources if self._reason is None else ():
            self._reason = self._reason or source.torn
        return self._reason

    @reason.setter
    def reason(self, value: str | None) -> None:
        self._reason = value

    @property
    def trouble(self) -> Trouble | None:
        """The reason as a rank tells it the others, with what to do about it; None if none."""
        return None if self.reason is None else Trouble(advice(self.reason), is_torn=True)

    def check(self, operation: str, group: comm.Group, cause: Exception | None = None) -> None:
        """Raise TornShardError on every rank of `group` if what one of them holds does not.

        cause: what went wrong on this rank, if anything did. Collective.
        """
        mine = torch.tensor([0.0 if self.reason is None else 1.0], device=self._device)
        everybody = torch.empty(group.size, device=self._device)
        comm.all_gather(everybody, mine, group, caller=f"{operation}: is a step torn?")
        if bool(everybody.any()):
            raise_together(operation, self.trouble, group, cause)
        if cause is not None:
            raise cause


def advice(reason: str) -> str:
    """What to say of parameters and states that do not belong to one step."""
    return (
        f"parameters and optimizer state do not belong to one step any more: {reason}; load a "
        f"checkpoint"
    )


def raise_together(
    operation: str, trouble: Trouble | None, group: comm.Group, cause: Exception | None = None
) -> None:
    """Raise ShardError on every rank, naming those that are in trouble. Collective.

    trouble: this rank's, or None; some rank has one.
    """
    told = comm.all_gather_object(trouble, group, caller=f"{operation}: what went wrong")
    found = {rank: each for rank, each in zip(group.ranks, told, strict=True) if each is not None}
    where = "; ".join(f"rank {rank}: {each.told}" for rank, each in found.items())
    kind = TornShardError if any(each.is_torn for each in found.values()) else ShardError
    raise kind(f"{operation}: {where}") from cause


class Attempts:
    """Work between exchanges, in which a rank must take part also after an error of its own.

    Attributes:
        error: of the first work that failed; what comes after it is left out.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Do some work, unless there was an error before; what it returns, None after an error."""
        if self.error is None:
            try:
                return work()
            except Exception as error:
                self.error = error
        return None

    def end_together(self, operation: str, groups: Iterable[comm.Group]) -> None:
        """Raise on every rank of the groups if there was an error on one. Collective.

        The error itself where it happened, ShardError that tells it elsewhere.
        """
        troubled = [group for group in groups if self._is_anywhere(operation, group)]
        if not troubled:
            return
        trouble = None
        if self.error is not None:
            told = f"{type(self.error).__name__}: {self.error}"
            trouble = Trouble(told, is_torn=False)
        try:
            # The largest has all ranks that see one of the others.
            raise_together(operation, trouble, max(troubled, key=lambda group: group.size))
        except ShardError as error:
            if self.error is not None:
                raise self.error from error
            raise

    def _is_anywhere(self, operation: str, group: comm.Group) -> bool:
        device = group.control_device()
        mine = torch.tensor([0.0 if self.error is None else 1.0], device=device)
        everybody = torch.zeros(group.size, device=device)
        comm.all_gather(everybody, mine, group, caller=f"{operation}: did all go well?")
        return bool(everybody.any())
