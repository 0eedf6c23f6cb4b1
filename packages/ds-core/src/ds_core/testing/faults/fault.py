"""What goes wrong, where, when and on which rank: drawn at random, written down as text."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ds_core.testing.faults.acts import flip_byte, truncate

Kind = Literal[
    "kill", "stop", "full disk", "wrong shape", "stuck loader", "truncated", "bit-flipped",
    "missing", "swap error", "stopped writer",
]  # fmt: skip
Point = Literal["forward", "backward", "step", "save", "load", "file"]

#: Where each kind can strike.
KINDS: dict[Kind, tuple[Point, ...]] = {
    "kill": ("forward", "backward", "step", "save", "load"),
    "stop": ("forward", "backward", "step", "save", "load"),
    "full disk": ("save",),
    "wrong shape": ("forward",),
    "stuck loader": ("load",),
    "truncated": ("file",),
    "bit-flipped": ("file",),
    "missing": ("file",),
    "swap error": ("step",),
    "stopped writer": ("save",),
}
#: Kinds that befall a file of a checkpoint, not a rank.
DAMAGES: tuple[Kind, ...] = ("truncated", "bit-flipped", "missing")


@dataclass(frozen=True)
class Fault:
    """One fault that waits for its moment.

    Attributes:
        kind: what happens. "swap error": a disk fails under offloaded state; "stopped writer": a
            rank is stopped while the thread of an asynchronous save writes.
        point: in which part of training; "file" for damage to a checkpoint between two runs.
        rank: to whom.
        step: during which optimizer step, from 1; a save counts to the step that it follows. A load
            of a checkpoint comes at its own time.
        nth: how many calls of Python functions into `point`; at its end if it has fewer.
        fraction: how far into a file, or into the bytes of a checkpoint, from 0 to 1. A disk fails
            to write below 0.5, to read from there on.
    """

    kind: Kind
    point: Point
    rank: int = 0
    step: int = 1
    nth: int = 0
    fraction: float = 0.5

    def to_json(self) -> str:
        """The fault as text, for an environment variable or a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Fault:
        """The fault that `to_json` wrote."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        if self.kind in DAMAGES:
            return f"{self.kind} file"
        return f"{self.kind} in {self.point}, rank {self.rank}"

    def damage(self, checkpoint: Path) -> Path:
        """Damage one file of a complete checkpoint as the fault says; returns which.

        Raises ValueError for a kind that does not befall files.
        """
        files = sorted(path for path in checkpoint.iterdir() if path.is_file())
        victim = files[self.nth % len(files)]
        size = victim.stat().st_size
        if self.kind == "missing":
            victim.unlink()
        elif self.kind == "truncated":
            truncate(victim, max(1, int(size * self.fraction)))
        elif self.kind == "bit-flipped":
            flip_byte(victim, int((size - 1) * self.fraction))
        else:
            raise ValueError(f"damage: a fault of kind {self.kind!r} does not befall files")
        return victim


def draw(
    source: random.Random,
    *,
    num_ranks: int,
    steps: Sequence[int],
    kinds: Sequence[Kind] = tuple(KINDS),
    most_calls: int = 400,
) -> Fault:
    """A fault of one of these kinds, at a random point and step, on a random rank.

    Args:
        source: of the random numbers: the same seed draws the same faults.
        num_ranks: of the run.
        steps: during which it may strike.
        kinds: to choose from.
        most_calls: upper bound of `Fault.nth`.
    """
    kind = source.choice(kinds)
    return Fault(
        kind,
        source.choice(KINDS[kind]),
        rank=source.randrange(num_ranks),
        step=source.choice(steps),
        nth=source.randrange(most_calls),
        fraction=source.uniform(0.02, 0.98),
    )
