"""The command `ds_nvme_tune`: `ds io tune` by the original's flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deepspeed._errors import NotProvidedError

_NO_DIFFERENCE = "makes no difference"


def words_of(args: Sequence[str] | None) -> list[str]:
    """The words after `ds` that do what these flags ask for. Raises NotProvidedError for GDS."""
    parser = argparse.ArgumentParser(
        prog="ds_nvme_tune",
        description="Find the settings that read and write a disk fastest, as an `aio` section.",
        epilog="`ds io tune` does it.",
    )
    add = parser.add_argument
    add("--nvme_dir", nargs="+", required=True, help="a folder on the disk; the first is measured")
    add("--io_size", default="400M", help="bytes of a pass")
    add("--loops", type=int, default=1, help="passes of the settings that stay")
    add("--log_dir", default=None, help="folder for the best settings, as aio.json")
    add("--gds", action="store_true", help="not provided")
    add("--sweep_config", default=None, help=_NO_DIFFERENCE)
    for flag in ("--no_read", "--no_write", "--gpu", "--flush_page_cache", "--verbose"):
        add(flag, action="store_true", help=_NO_DIFFERENCE)
    given = parser.parse_args(args)
    if given.gds:
        raise NotProvidedError("--gds: there is no GPUDirect Storage; leave it out")
    words = ["io", "tune", given.nvme_dir[0], "--size", given.io_size]
    words += ["--rounds", str(given.loops)]
    if given.log_dir is not None:
        words += ["--output", str(Path(given.log_dir, "aio.json"))]
    return words


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    from ds_core.cli import main as ds

    try:
        words = words_of(args)
    except NotProvidedError as error:
        sys.stderr.write(f"ds_nvme_tune: {error}\n")
        sys.exit(2)
    if "--output" in words:
        Path(words[-1]).parent.mkdir(parents=True, exist_ok=True)
    ds(words)
