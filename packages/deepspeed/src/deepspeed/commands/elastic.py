"""The command `ds_elastic`: `ds elastic` by the original's flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def words_of(args: Sequence[str] | None) -> list[str]:
    """The words after `ds` that do what these flags ask for."""
    parser = argparse.ArgumentParser(
        prog="ds_elastic",
        description="Show the batch of an elastic job and the numbers of GPUs that suit it.",
    )
    add = parser.add_argument
    add("-c", "--config", required=True, help='config with an "elasticity" section')
    add("-w", "--world-size", type=int, default=0, help="GPUs: show the batch for so many")
    given = parser.parse_args(args)
    sized = ["--world-size", str(given.world_size)] if given.world_size > 0 else []
    return ["elastic", given.config, *sized]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    from ds_core.cli import main as ds

    ds(words_of(args))
