"""What must work where only this package and its closure (ds-core, ds-ops, ds-zero) are installed.

`nox -s alone` runs it from the built wheel, outside the source tree: `python -I smoke.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import deepspeed
from deepspeed.moe.layer import MoE


def main() -> None:
    assert "site-packages" in Path(deepspeed.__file__).parts, deepspeed.__file__
    assert deepspeed.__version__ == version("deepspeed")
    assert deepspeed.__provider__ == "ds"
    what_is_not_provided_says_so()
    collectives_work_alone()
    losses_go_down()
    commands_are_installed()
    print("deepspeed", deepspeed.__version__, "works alone")


def what_is_not_provided_says_so() -> None:
    told = ""
    try:
        MoE(8)
    except NotImplementedError as error:
        told = str(error)
    assert "ds-moe" in told, told


def collectives_work_alone() -> None:
    deepspeed.init_distributed("gloo")
    tensor = torch.ones(3)
    deepspeed.comm.all_reduce(tensor)
    assert tensor.sum().item() == 3 * deepspeed.comm.get_world_size()


def losses_go_down() -> None:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 2},
    }
    engine, *_ = deepspeed.initialize(model=torch.nn.Linear(8, 1), config=config)
    losses, x = [], torch.randn(16, 8)
    for _ in range(20):
        loss = (engine(x) - x.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses


def commands_are_installed() -> None:
    folder = Path(sys.executable).parent
    for name in (
        "deepspeed",
        "ds_report",
        "dsr",
        "ds_elastic",
        "ds_io",
        "ds_nvme_tune",
        "ds_bench",
    ):
        program = shutil.which(name, path=str(folder))
        assert program is not None, name
        subprocess.run([program, "--help"], check=True, capture_output=True)


if __name__ == "__main__":
    main()
