"""Short programs of users of accelerate, one after the other in the same two processes.

Each scene makes its own Accelerator, as accelerate's own tests do, and returns what it saw; the
files `scenes_*.py` hold them. `OUT/rankN.json` has what each said by its name, under "error" the
traceback of one that failed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from pathlib import Path

import scenes_settings
import scenes_training
import scenes_zero3
import torch.distributed as dist

SCENES = scenes_settings.SCENES | scenes_training.SCENES | scenes_zero3.SCENES


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", nargs="*", default=list(SCENES))
    options = parser.parse_args()
    told = {}
    for name in options.scenes:
        began = time.perf_counter()
        try:
            told[name] = SCENES[name](options.out)
        except Exception:
            told[name] = {"error": traceback.format_exc()}
        told[name]["took_s"] = round(time.perf_counter() - began, 2)
        # Each time: what ends the process leaves the scenes before it.
        (options.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
