"""The command `ds_bench`: `ds bench comm` by the original's flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

#: The flags that choose operations.
_OPERATIONS = {
    "--all-reduce": "all_reduce",
    "--all-gather": "all_gather",
    "--all-to-all": "all_to_all",
    "--broadcast": "broadcast",
    "--pt2pt": "exchange",
}


def words_of(args: Sequence[str] | None) -> list[str]:
    """The words after `ds` that do what these flags ask for."""
    parser = argparse.ArgumentParser(
        prog="ds_bench",
        description="Measure collectives: time, algorithm and bus bandwidth by message size.",
        epilog="`ds bench comm` does it, and starts its ranks itself.",
    )
    add = parser.add_argument
    add("--local_rank", type=int, default=0, help="makes no difference")
    add("--trials", type=int, default=5, help="times that each size is measured")
    add("--warmups", type=int, default=2, help="times before that")
    add("--maxsize", type=int, default=24, help="largest message, as a power of 2 of elements")
    add("--async-op", action="store_true", help="start without waiting, then wait")
    add("--bw-unit", default="Gbps", choices=["Gbps", "GBps"], help="unit of bandwidths")
    add("--backend", default=None, help="backend of torch.distributed")
    add("--dist", default="deepspeed", help="makes no difference")
    add("--scan", action="store_true", help="all sizes up to the largest; else it alone")
    add("--raw", action="store_true", help="numbers without units, as JSON")
    for flag, name in _OPERATIONS.items():
        add(flag, action="append_const", const=name, dest="operations", help=f"measure {name}")
    add("--dtype", default="torch.float", help="of the tensors")
    add("--mem-factor", type=float, default=0.1, help="makes no difference")
    add("--debug", action="store_true", help="makes no difference")
    given = parser.parse_args(args)
    dtype = given.dtype.removeprefix("torch.")
    words = ["bench", "comm", "--trials", str(given.trials), "--warm-ups", str(given.warmups)]
    for name in given.operations or ():
        words += ["--op", name]
    words += ["--dtype", dtype, "--max-elements", str(2**given.maxsize)]
    words += [] if given.scan else ["--only-largest"]
    words += ["--async-op"] if given.async_op else []
    words += ["--bits"] if given.bw_unit == "Gbps" else []
    words += ["--json"] if given.raw else []
    words += ["--backend", given.backend] if given.backend else []
    return words


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    from ds_core.cli import main as ds

    ds(words_of(args))
