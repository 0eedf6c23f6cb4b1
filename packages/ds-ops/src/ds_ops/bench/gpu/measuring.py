"""Every kernel for GPUs beside what the GPU can do, and beside torch or another peer.

    python -m ds_ops.bench.gpu --record benchmarks/results

writes the table into the result file of this GPU and day, beside what ran there. A kernel that is
bound by memory must reach 0.9 of the bandwidth of a copy, measured in the same process.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ds_core import ops
from ds_core.errors import OpError
from ds_ops import gpu_runs
from ds_ops.bench import timing
from ds_ops.bench.gpu.attention import TARGETS
from ds_ops.bench.gpu.peers import PEERS
from ds_ops.bench.gpu.sizes import SIZES
from ds_ops.bench.gpu.timing import Ceilings, ceilings, interleave
from ds_ops.gpu_runs import GpuKernel

#: How many times the floor a kernel may take: 0.9 of the bandwidth of a copy; packed weights of one
#: row of inputs are unpacked on the way.
_MAX_X_FLOOR = 1 / 0.9
_MAX_X_FLOOR_OF = {"weight_only_linear": 1 / 0.85}
_MIN_BYTES = 64 << 20  # less is over before a GPU is at its best


def rows(seconds: float) -> Iterator[timing.Row]:
    """Each kernel at each of its sizes. Raises OpError where there is no GPU."""
    if not torch.cuda.is_available():
        raise OpError("ds ops bench gpu: torch finds no GPU here")
    best = ceilings()
    for kernel in gpu_runs.kernels():
        if ops.available(kernel.op, "cuda")[kernel.implementation] is None:
            yield from measured(kernel, best, seconds)


def measured(kernel: GpuKernel, best: Ceilings, seconds: float) -> Iterator[timing.Row]:
    """The rows of one kernel, each beside a peer, or one without if there is none."""
    op, device = ops.get(kernel.op), torch.device("cuda")
    refuses = ops.choose(kernel.op, "cuda", kernel.implementation).implementation.partly()
    for label, args in SIZES.get(kernel.op, op.benchmarks)(device):
        if refuses is not None and refuses(*args) is not None:
            continue
        ours = functools.partial(ops.run, kernel.op, *args, impl=kernel.implementation)
        peers = PEERS[kernel.op](*args) if kernel.op in PEERS else {}
        found = interleave({"ours": ours, **peers}, seconds=seconds)
        floor = op.floor(*args)
        dtype = next(a.dtype for a in args if torch.is_tensor(a))
        bound_by_memory = floor.bytes > _MIN_BYTES and floor.flops < 16 * floor.bytes
        allowed = _MAX_X_FLOOR_OF.get(kernel.op, _MAX_X_FLOOR)
        least = TARGETS[kernel.op](*args) if kernel.op in TARGETS else 1.0
        for peer in peers or ("",):
            yield timing.row(
                *(kernel.key, label, dtype, found),
                peer=peer,
                floor_ms=best.floor_ms(floor.bytes, floor.flops, dtype),
                max_x_floor=allowed if bound_by_memory else None,
                min_x_peer=least if peer else None,
            )


def record(found: Sequence[timing.Row], best: Ceilings, folder: Path) -> Path:
    """Write rows into the result file of this GPU and day; its path."""
    told = {
        "torch": torch.__version__,
        "copy_bytes_per_s": best.bytes_per_s,
        "matmul_flops_per_s": {timing.short_dtype(t): f for t, f in best.flops_per_s.items()},
        "rows": [row.as_dict() for row in found],
    }
    return gpu_runs.add({"measured": told}, best.name, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=rows.__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="per row")
    parser.add_argument("--record", type=Path, help="folder of result files")
    given = parser.parse_args(arguments)
    found = timing.run({"gpu": rows}, seconds=given.seconds)
    if given.record:
        record(found, ceilings(), given.record)
