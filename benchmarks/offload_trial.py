"""One training run under a cap on memory, in a process of its own: `offload_trial.py '{...}'`.

Prints one line of JSON: parameters, seconds per step, peak memory, bytes swapped, losses. A run
that needs more than the cap ends with an error, as it would for a user.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from models import Shape, batches, make_gpt, num_parameters
from original import original


@dataclass(frozen=True)
class Trial:
    """What to train, and how.

    Attributes:
        name: "ours" or "deepspeed".
        depth, width: of the GPT.
        states: where optimizer states live: "device", "cpu" or "nvme".
        parameters: the same for parameters, at stage 3.
        stage, dtype: of ZeRO, and of parameters: "fp32", or "bf16" with fp32 master weights.
        cap: bytes of private memory that the process may have; 0: no cap.
        steps: how many are taken; the first two are not timed.
        early: whether units are updated in backward.
        folder: on the disk.
        most_in_cpu: elements of parameters on "nvme" that stay in memory nevertheless.
    """

    name: str
    depth: int
    width: int = 1024
    states: str = "cpu"
    parameters: str = "device"
    stage: int = 2
    dtype: str = "fp32"
    cap: int = 0
    steps: int = 3
    early: bool = False
    folder: str = ""
    most_in_cpu: int = 0

    @property
    def shape(self) -> Shape:
        """Of the model: little of it is not in blocks."""
        return Shape(
            vocab=2048,
            width=self.width,
            depth=self.depth,
            heads=self.width // 64,
            context=32,
            tokens=32,
            micro_batch=1,
        )


def run(trial: Trial) -> dict[str, Any]:
    """Train, and say what it took."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    make = _ours if trial.name == "ours" else _deepspeed
    _load(trial.name)
    if trial.cap:
        resource.setrlimit(resource.RLIMIT_DATA, (trial.cap, trial.cap))
    step, swapped = make(trial)
    data, losses, seconds, moved = batches(trial.shape, 0), [], [], []
    for _ in range(trial.steps):
        batch, before, begin = next(data), sum(swapped()), time.perf_counter()
        losses.append(float(step(*batch)))
        seconds.append(time.perf_counter() - begin)
        moved.append(sum(swapped()) - before)
    return {
        "parameters": num_parameters(trial.shape),
        "seconds": min(seconds[2:] or seconds),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "swapped": moved[-1],
        "losses": losses,
    }


def update_rate(trial: Trial) -> dict[str, float]:
    """Bytes per second that an update reads and writes, of the best of several steps."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    _load(trial.name)
    (step, swapped), data, rates = _ours(trial), batches(trial.shape, 0), []
    for _ in range(trial.steps + 2):
        step.backward(*next(data))
        before, begin = sum(swapped()), time.perf_counter()
        step.update()
        rates.append((sum(swapped()) - before) / (time.perf_counter() - begin))
    return {"rate": max(rates[1:])}


def _load(name: str) -> None:
    """Import, before the cap counts, what a program imports anyway."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(20000 + os.getpid() % 20000))
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(key, value)
    if name == "ours":
        import ds_zero  # noqa: F401
    else:
        original()


def _ours(trial: Trial) -> Any:
    import ds_zero
    from ds_core import comm, optimizers
    from ds_core.precision import Precision

    comm.init()
    # Built in the format that it computes in: fp32 values of all of it may not fit.
    torch.set_default_dtype(torch.bfloat16 if trial.dtype == "bf16" else torch.float32)
    model = make_gpt(trial.shape)
    torch.set_default_dtype(torch.float32)
    chosen = Adam(lr=1e-3)
    named = list(model.named_parameters())
    bf16 = Precision(compute=torch.bfloat16, master=torch.float32)
    optimizer = ds_zero.shard(
        model,
        optimizers.build(chosen, named, on_host=True),
        trial.stage,
        precision=bf16 if trial.dtype == "bf16" else None,
        update_in_backward=trial.early,
        offload=ds_zero.Offload(
            optimizer=trial.states,  # type: ignore[arg-type]
            parameters=trial.parameters,  # type: ignore[arg-type]
            folder=trial.folder or None,
            max_numel_in_cpu=trial.most_in_cpu,
        ),
    )

    return _Step(model, optimizer), optimizer.swap_bytes


class _Step:
    """One step of ours; its two halves can be called apart."""

    def __init__(self, model: torch.nn.Module, optimizer: Any) -> None:
        self._model, self._optimizer = model, optimizer

    def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
        loss = self.backward(*batch)
        self.update()
        return loss

    def backward(self, *batch: torch.Tensor) -> torch.Tensor:
        """Forward and backward; the detached loss."""
        loss: torch.Tensor = self._model(*batch)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """The optimizer's step, until what it writes is written."""
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._optimizer.settle()


class Adam:
    """An optimizer section: AdamW, without decay as DeepSpeed's default is."""

    type = "AdamW"

    def __init__(self, lr: float) -> None:
        self.params = {"lr": lr, "weight_decay": 0.0}


def _deepspeed(trial: Trial) -> Any:
    deepspeed = original()

    deepspeed.init_distributed("gloo")
    # Its defaults reserve 2 GB for gradients on their way.
    buckets = {"reduce_bucket_size": 1 << 24, "allgather_bucket_size": 1 << 24}
    zero: dict[str, Any] = {"stage": trial.stage, "sub_group_size": 1 << 24, **buckets}
    for key, where in (("offload_optimizer", trial.states), ("offload_param", trial.parameters)):
        if where != "device":
            zero[key] = {"device": where, "pin_memory": False}
            if where == "nvme":
                zero[key]["nvme_path"] = trial.folder
    if trial.parameters == "nvme":
        zero["offload_param"]["max_in_cpu"] = trial.most_in_cpu
    if trial.states == "nvme":
        # Pipelined both ways, it runs out of its default of 4 buffers.
        pipelined = {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12}
        zero["offload_optimizer"] |= pipelined
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}},
        "zero_optimization": zero,
        "bf16": {"enabled": trial.dtype == "bf16"},
        "aio": {"block_size": 1 << 20, "queue_depth": 32, "overlap_events": True},
    }
    model = make_gpt(trial.shape)
    engine, *_ = deepspeed.initialize(
        model=model, config=config, model_parameters=model.parameters()
    )

    def step(*batch: torch.Tensor) -> torch.Tensor:
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step, lambda: (0, 0)


if __name__ == "__main__":
    chosen = Trial(**json.loads(sys.argv[1]))
    measure = update_rate if "--update-only" in sys.argv else run
    print("\n" + json.dumps(measure(chosen)))
