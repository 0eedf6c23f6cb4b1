"""What must work where only ds-core and its closure are installed.

`nox -s alone` runs it from the built wheel, outside the source tree: `python -I smoke.py`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import ds_core
from ds_core.errors import DsError

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-2}},
}


def main() -> None:
    assert "site-packages" in Path(ds_core.__file__).parts, ds_core.__file__
    assert ds_core.__version__ == version("ds-core")
    engine_trains_and_resumes()
    missing_package_is_named()
    command_starts()
    print("ds-core", ds_core.__version__, "works alone")


def engine_trains_and_resumes() -> None:
    torch.manual_seed(0)
    engine = ds_core.initialize(torch.nn.Linear(8, 1), CONFIG)
    batches = [torch.randn(16, 8) for _ in range(10)]
    losses = [_step(engine, x) for x in batches * 4]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10]), losses
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder)
        expected = _step(engine, batches[0])
        resumed = ds_core.initialize(torch.nn.Linear(8, 1), CONFIG)
        resumed.load_checkpoint(folder)
        assert _step(resumed, batches[0]) == expected


def _step(engine: Any, x: torch.Tensor) -> float:
    loss = (engine(x) - x.sum(1, keepdim=True)).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


def missing_package_is_named() -> None:
    message = "no error"
    try:
        ds_core.initialize(torch.nn.Linear(8, 1), CONFIG | {"zero_optimization": {"stage": 2}})
    except DsError as error:
        message = str(error)
    assert "pip install ds-zero" in message, message


def command_starts() -> None:
    ds = Path(sys.executable).with_name("ds")
    done = subprocess.run([ds, "--help"], capture_output=True, text=True, check=True)
    assert "run" in done.stdout, done.stdout


if __name__ == "__main__":
    main()
