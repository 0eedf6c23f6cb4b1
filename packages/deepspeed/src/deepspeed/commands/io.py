"""The command `ds_io`: `ds io bench` by the original's flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deepspeed._errors import NotProvidedError

_NO_DIFFERENCE = "makes no difference"
#: Flags that take a value, or none, and change nothing here.
_VALUES = ("--fast_io_size", "--io_parallel", "--engine", "--multi_process", "--warmup_loops")
_SWITCHES = (
    *("--read", "--validate", "--single_submit", "--sequential_requests", "--slow_bounce_buffer"),
    *("--use_accelerator_pin_memory", "--torch_legacy_save", "--include_warmup_time"),
    "--different_file_each_iteration",
)


def parser_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="ds_io",
        description="Read and write a file by every engine that can run here, and by fio.",
        epilog="`ds io bench` does it, in both directions, around the page cache.",
    )
    add = parser.add_argument
    add("--folder", default=None, help="a folder on the disk to measure; default: this one")
    add(
        "--folder_to_device_mapping", nargs="+", default=[], metavar="FOLDER:DEVICE",
        help="the first folder is measured",
    )  # fmt: skip
    add("--io_size", required=True, help="bytes of a pass, such as 400M")
    add("--block_size", default="1M", help="bytes of one transfer")
    add("--queue_depth", type=int, default=32, help="transfers in flight")
    add("--loops", type=int, default=3, help="passes; the fastest counts")
    add("--gpu", action="store_true", help=_NO_DIFFERENCE + ": disk to host memory is measured")
    add("--use_gds", action="store_true", help="not provided")
    for flag in _VALUES:
        add(flag, default=None, help=_NO_DIFFERENCE)
    for flag in _SWITCHES:
        add(flag, action="store_true", help=_NO_DIFFERENCE)
    return parser


def words_of(args: Sequence[str] | None) -> list[str]:
    """The words after `ds` that do what these flags ask for. Raises NotProvidedError for GDS."""
    given = parser_of().parse_args(args)
    if given.use_gds:
        raise NotProvidedError("--use_gds: there is no GPUDirect Storage; leave it out")
    mapped = [text.partition(":")[0] for text in given.folder_to_device_mapping]
    folder = given.folder or (mapped[0] if mapped else ".")
    sizes = ["--size", given.io_size, "--block", given.block_size]
    return [
        *("io", "bench", folder, *sizes, "--depth", str(given.queue_depth)),
        *("--rounds", str(given.loops)),
    ]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    from ds_core.cli import main as ds

    try:
        words = words_of(args)
    except NotProvidedError as error:
        sys.stderr.write(f"ds_io: {error}\n")
        sys.exit(2)
    ds(words)
