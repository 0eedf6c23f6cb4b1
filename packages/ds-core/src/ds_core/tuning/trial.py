"""One trial, in its own processes: train for a few steps, and write down how long they took.

Started by `ds_core.tuning.trial_runner` as `ds run --module ds_core.tuning.trial FILE`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ds_core
from ds_core import accelerator, comm
from ds_core.engine import Engine
from ds_core.errors import TuningError
from ds_core.planning.model_source import call_function, load_function

#: The file beside a trial's own in which its result is.
RESULT = "result.json"


def main(file: str) -> None:
    """Run the trial that `file` describes, and leave its result beside it. Collective."""
    path = Path(file)
    task = json.loads(path.read_text(encoding="utf-8"))
    try:
        result = run(task["target"], task["config"], task["warmup"], task["steps"])
    except Exception as error:
        # The first rank that fails says why: those that it leaves behind fail for its absence.
        with contextlib.suppress(FileExistsError), open(path.with_name(RESULT), "x") as out:
            json.dump({"failed": _reason(error)}, out)
        raise
    if result["rank"] == 0:
        path.with_name(RESULT).write_text(json.dumps(result), encoding="utf-8")


def _reason(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{kind}: {first}"


def run(target: str, config: Mapping[str, Any], warmup: int, steps: int) -> dict[str, Any]:
    """Seconds of each of `steps` optimizer steps after `warmup` others, and the memory held.

    "processor_seconds" are those of this rank's host alone.

    Every step trains on the same micro-batch, which the target returns. Collective.
    """
    comm.init()
    torch.manual_seed(0)
    loaded = ds_core.config.load(config, world_size=comm.Mesh.world().size("dp"))
    micro = loaded.train_micro_batch_size_per_gpu
    model, batch = call_function(load_function(target), micro)
    if batch is None:
        raise TuningError(
            f"{target}: returned a model only; let it return (model, batch), with a batch of "
            f"micro_batch_size samples that the model is called with and whose output is a loss"
        )
    engine = ds_core.initialize(model, loaded)
    device = accelerator.current()
    seconds: list[float] = []
    processor_seconds: list[float] = []
    for step in range(warmup + steps):
        comm.barrier(engine.mesh.group("dp"), caller="trial")
        begin, processor_begin = time.perf_counter(), time.process_time()
        _step(engine, batch)
        device.synchronize()
        if step >= warmup:
            seconds.append(time.perf_counter() - begin)
            processor_seconds.append(time.process_time() - processor_begin)
    return {
        "rank": engine.mesh.group("dp").rank,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "memory": engine.memory(),
        "peak_bytes": device.peak_memory(),
    }


def _step(engine: Engine, batch: Any) -> None:
    for _ in range(engine.accumulation):
        engine.backward(_loss(engine.run_batch(batch)))
        engine.step()


def _loss(output: Any) -> torch.Tensor:
    """The loss in what a model returns: itself, `.loss`, ["loss"], or the first of a tuple."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) and "loss" in output:
        return _loss(output["loss"])
    if hasattr(output, "loss"):
        return _loss(output.loss)
    if isinstance(output, tuple | list) and output:
        return _loss(output[0])
    raise TuningError(
        f"the model returned {type(output).__name__}, in which there is no loss; return a scalar "
        f"tensor, or an object with .loss"
    )


if __name__ == "__main__":
    main(sys.argv[1])
