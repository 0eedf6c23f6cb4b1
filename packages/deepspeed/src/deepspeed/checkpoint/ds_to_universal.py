"""The command that makes a checkpoint loadable at another number of ranks: ours are already.

    python -m deepspeed.checkpoint.ds_to_universal --input_folder IN --output_folder OUT

Says so for one of ours, and writes nothing. One of the original package is imported into our
format, which then loads at any number of ranks and any ZeRO stage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_core.checkpoint import import_checkpoint
from ds_core.checkpoint.any_format import is_ours
from ds_core.errors import DsError


def main(args: argparse.Namespace | Sequence[str] | None = None) -> None:
    """Explain, or import. args: parsed already, or the words of the command line."""
    given = args if isinstance(args, argparse.Namespace) else _parser().parse_args(args)
    source, out = Path(given.input_folder), Path(given.output_folder)
    if source.is_dir() and is_ours(source):
        sys.stdout.write(
            f"{source} is a checkpoint of ds-core, which loads at any number of ranks, ZeRO stage "
            f"and offload setting as it is: nothing was written. Load it from {source}; "
            f'"load_universal" makes no difference.\n'
        )
        return
    report = import_checkpoint(source, out, drop_objects=not given.strict)
    sys.stdout.write(
        f"{report.source} in {source} was imported to {report.path}: {report.num_tensors} tensors. "
        f"It loads at any number of ranks and ZeRO stage; load it from {out}.\n"
    )


def parse_arguments(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return _parser().parse_args(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deepspeed.checkpoint.ds_to_universal",
        description="Make a checkpoint loadable at any number of ranks; those of ds-core are.",
    )
    add = parser.add_argument
    add("--input_folder", required=True, help="folder of a checkpoint, or of checkpoints")
    add("--output_folder", required=True, help="folder for the imported checkpoint")
    add("--num_extract_workers", type=int, default=4, help="makes no difference")
    add("--num_merge_workers", type=int, default=2, help="makes no difference")
    add("--keep_temp_folder", action="store_true", help="makes no difference: there is none")
    add(
        "--no_strict", dest="strict", action="store_false", help="leave out objects that only "
        "running code could read"
    )  # fmt: skip
    add("--inject_missing_state", action="store_true", help="makes no difference")
    return parser


if __name__ == "__main__":
    try:
        main()
    except DsError as error:
        sys.exit(f"ds_to_universal: {error}")
