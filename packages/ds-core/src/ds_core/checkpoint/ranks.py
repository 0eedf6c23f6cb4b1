"""Steps that all ranks take together: what fails on one rank is raised on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from ds_core.errors import CheckpointError

T = TypeVar("T")
R = TypeVar("R")


class Ranks:
    """The ranks of a process group, or the one process there is without torch.distributed.

    Args:
        group: default: all ranks.

    Attributes:
        rank: this process's rank in the group.
        size: number of ranks in it.
        distributed: whether there is a process group at all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.size = dist.get_world_size(group) if self.distributed else 1
        if self.rank < 0:
            raise CheckpointError("group: this rank does not belong to it; only its members call")

    def gather(self, what: str, step: Callable[[], T]) -> list[T]:
        """What `step()` returns on every rank, in rank order.

        Collective. `what` says what is being done, for the error.

        Raises:
            CheckpointError: on every rank, if `step` raised on any; names the ranks and the cause.
        """
        outcome: tuple[str | None, T | None]
        try:
            outcome = (None, step())
        except Exception as error:
            outcome = (describe(error), None)
        outcomes: list[Any] = [outcome]
        if self.distributed:
            outcomes = [None] * self.size
            try:
                dist.all_gather_object(outcomes, outcome, group=self.group)
            except Exception as error:
                raise self.lost(what, error) from error
        failures = {rank: text for rank, (text, _) in enumerate(outcomes) if text is not None}
        if failures:
            raise self.failure(what, failures)
        return [result for _, result in outcomes]

    def each(self, what: str, step: Callable[[], T]) -> T:
        """What `step()` returns on this rank, once it has succeeded on all. As `gather`."""
        results: list[T] = []
        self.gather(what, lambda: results.append(step()))
        return results[0]

    def first(self, what: str, step: Callable[[], T]) -> T:
        """What `step()` returns on rank 0, where alone it runs. Otherwise as `gather`."""
        results = self.gather(what, lambda: step() if self.rank == 0 else None)
        return results[0]  # type: ignore[return-value]

    def through_first(
        self, what: str, step: Callable[[], T], decide: Callable[[list[T]], list[R]]
    ) -> R:
        """What rank 0 decides for this rank, once it has seen what `step()` returned on every rank.

        Collective. Only rank 0 is sent the results, and only to each its own decision.

        Args:
            step: runs on every rank.
            decide: runs on rank 0, with the results in rank order, if all steps succeeded; returns
                one decision per rank.

        Raises:
            CheckpointError: on every rank, if anything raised on any; names the ranks and the
                cause.
        """
        outcome: tuple[str | None, T | None]
        try:
            outcome = (None, step())
        except Exception as error:
            outcome = (describe(error), None)
        try:
            outcomes = self._to_first(outcome)
            answer = self._from_first(_decided(outcomes, decide) if self.rank == 0 else [])
        except Exception as error:
            raise self.lost(what, error) from error
        failures, decision = answer
        if failures:
            raise self.failure(what, failures)
        return decision

    def _to_first(self, mine: Any) -> list[Any]:
        """What every rank has, on rank 0; an empty list elsewhere."""
        if not self.distributed:
            return [mine]
        everybodys: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, everybodys, group=self.group, group_dst=0)
        return everybodys or []

    def _from_first(self, everybodys: list[Any]) -> Any:
        """This rank's entry of the list that rank 0 has."""
        if not self.distributed:
            return everybodys[0]
        mine: list[Any] = [None]
        sent = everybodys if self.rank == 0 else None
        dist.scatter_object_list(mine, sent, group=self.group, group_src=0)
        return mine[0]

    def lost(self, what: str, error: Exception) -> CheckpointError:
        """The error for a step in which this rank lost contact with the others."""
        return CheckpointError(
            f"{what} failed on rank {self.rank}, which lost contact with another rank; that one "
            f"has probably died, its log says why: {describe(error)}"
        )

    def failure(self, what: str, failures: Mapping[int, str]) -> CheckpointError:
        """The error for a step that failed on some ranks, given the cause on each."""
        ranks_by_text: dict[str, list[int]] = {}
        for rank, text in sorted(failures.items()):
            ranks_by_text.setdefault(text, []).append(rank)
        if len(failures) == self.size and len(ranks_by_text) == 1:
            return CheckpointError(f"{what}: {next(iter(ranks_by_text))}")
        causes = (
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}"
            for text, ranks in ranks_by_text.items()
        )
        return CheckpointError(f"{what} failed on {'; '.join(causes)}")


def _decided(
    outcomes: list[tuple[str | None, Any]], decide: Callable[[list[Any]], list[Any]]
) -> list[tuple[dict[int, str], Any]]:
    """For each rank, the failures there were, and what was decided for it if there were none."""
    failures = {rank: text for rank, (text, _) in enumerate(outcomes) if text is not None}
    decisions: list[Any] = [None] * len(outcomes)
    if not failures:
        try:
            decisions = decide([result for _, result in outcomes])
        except Exception as error:
            failures = {0: describe(error)}
    return [(failures, decision) for decision in decisions]


def describe(error: BaseException) -> str:
    """An error as text; with its type unless it is one of ours, whose text says all."""
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}"
