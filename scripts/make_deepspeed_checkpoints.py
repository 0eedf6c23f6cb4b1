"""Makes the checkpoints of DeepSpeed that the tests of `ds checkpoint import` read.

    python scripts/make_deepspeed_checkpoints.py packages/ds-core/tests/data/deepspeed

Needs deepspeed (0.19.8 made those that are there) and no accelerator. Each case is trained for
three steps on two processes or one, saved by DeepSpeed itself, and packed into `<case>.tar.xz`
with `expected.safetensors`: what DeepSpeed says the checkpoint holds, and its weights one step
later, which whoever resumes the checkpoint has to reach.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

#: name of the case: ZeRO stage, number format, processes, further keys of the configuration.
CASES: dict[str, tuple[int, str, int, dict[str, Any]]] = {
    "stage0-fp32-w1": (0, "fp32", 1, {}),
    "stage0-bf16-w2": (0, "bf16", 2, {}),
    "stage1-fp32-w2": (1, "fp32", 2, {}),
    "stage1-bf16-w2": (1, "bf16", 2, {}),
    "stage2-bf16-w2": (2, "bf16", 2, {}),
    "stage2-fp16-w2": (2, "fp16", 2, {}),
    # DeepSpeed's converter mixes these up: the addresses that it saves are not where things are.
    "stage2-bf16-w2-shuffled": (2, "bf16", 2, {"round_robin_gradients": True}),
    "stage3-fp32-w1": (3, "fp32", 1, {}),
    "stage3-bf16-w2": (3, "bf16", 2, {"sub_group_size": 40}),
}

#: The cases that also keep their checkpoint in DeepSpeed's universal format.
WITH_UNIVERSAL = ("stage1-fp32-w2", "stage3-bf16-w2")


class Tiny(nn.Module):
    """Odd sizes for padding, a tied head, a frozen layer, a scalar and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.frozen = nn.Linear(5, 5)
        self.hidden = nn.Linear(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.arange(5.0))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.embed(ids)) + self.offset.to(self.gain.dtype)
        x = self.out(torch.tanh(self.hidden(x))) * self.gain
        return nn.functional.cross_entropy(self.head(x).float(), ids)


def batch_of(step: int, rank: int) -> torch.Tensor:
    """`[4]` token ids, other ones for every step and rank."""
    return (torch.arange(4) * 3 + step * 2 + rank) % 7


def groups_of(model: nn.Module, *, several: bool) -> list[dict[str, Any]]:
    """Matrices with weight decay and the rest without; or one group of all."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not several:
        return [{"params": trained, "weight_decay": 0.1}]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def train(case: str, folder: Path) -> None:
    """What each process does: train, save, and train one step more."""
    import deepspeed

    stage, precision, _, extra = CASES[case]
    torch.manual_seed(0)
    model = Tiny()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **extra},
        "zero_allow_untested_optimizer": True,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if precision == "fp16":
        config["fp16"]["initial_scale_power"] = 8
    groups = groups_of(model, several=stage > 0)
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=config,
        dist_init_required=True,
    )
    for step in range(3):
        one_step(engine, step)
    engine.save_checkpoint(str(folder), tag="three", client_state={"note": "three steps"})
    one_step(engine, 3)
    engine.save_checkpoint(str(folder), tag="four")


def one_step(engine: Any, step: int) -> None:
    """One forward, backward and optimizer step."""
    loss = engine(batch_of(step, engine.global_rank))
    engine.backward(loss)
    engine.step()


def run_ranks(case: str, folder: Path) -> None:
    """Train one case in fresh processes."""
    world_size = CASES[case][2]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29577",
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, __file__, str(folder), "--train", case]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"{case} failed")


def convert_to_universal(source: Path, out: Path) -> None:
    """Run DeepSpeed's own converter to its universal format."""
    words = ["--input_folder", str(source), "--output_folder", str(out), "--inject_missing_state"]
    words += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    module = "deepspeed.checkpoint.ds_to_universal"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-m", module, *words], check=True, env=environment)


def held(case: str, folder: Path) -> dict[str, torch.Tensor]:
    """Master weights and moments by name, as DeepSpeed's own tools read them from a checkpoint."""
    shapes = {name: p.shape for name, p in Tiny().named_parameters() if p.requires_grad}
    found: dict[str, torch.Tensor] = {}
    if CASES[case][0] == 0:
        # No tool for these; the optimizer was built over the parameters in this order.
        state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
        optimizer = state["optimizer"]
        masters = optimizer.get("fp32_groups", [[state["module"][name] for name in shapes]])[0]
        states = optimizer.get("optimizer_state_dict", optimizer)["state"]
        for index, name in enumerate(shapes):
            found[name] = masters[index]
            found |= {f"{key}.{name}": states[index][key] for key in ("exp_avg", "exp_avg_sq")}
        return found
    universal = folder.with_name(f"{folder.name}-universal")
    convert_to_universal(folder, universal)
    for name, shape in shapes.items():
        for key, prefix in (("fp32", ""), ("exp_avg", "exp_avg."), ("exp_avg_sq", "exp_avg_sq.")):
            value = torch.load(universal / "zero" / name / f"{key}.pt", weights_only=False)
            tensor = value["param"] if isinstance(value, dict) else value
            found[prefix + name] = tensor.reshape(shape)
    return found


def make(case: str, out: Path) -> None:
    """Train one case and pack what it leaves behind, with what DeepSpeed reads from it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / case
        folder.mkdir()
        run_ranks(case, folder)
        expected = {} if case.endswith("shuffled") else held(case, folder / "three")
        if CASES[case][0]:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            for tag, prefix in (("three", "fp32"), ("four", "next")):
                whole = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag)
                expected |= {f"{prefix}.{name}": value for name, value in whole.items()}
        else:
            later = held(case, folder / "four")
            expected |= {f"next.{name}": v for name, v in later.items() if "exp_avg" not in name}
        tensors = {name: value.detach().clone().contiguous() for name, value in expected.items()}
        save_file(tensors, folder / "expected.safetensors")
        if case in WITH_UNIVERSAL:
            (folder / "three-universal").rename(folder / "universal")
        for name in ("three-universal", "four-universal", "four"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "latest").write_text("three")
        for script in folder.rglob("*.py"):  # DeepSpeed puts its own converter beside the data
            script.unlink()
        with tarfile.open(out / f"{case}.tar.xz", "w:xz") as archive:
            archive.add(folder, case, filter=anonymous)


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the time and the user that the file comes from."""
    entry.mtime = entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--case", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--train", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.out)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for case in options.case:
        make(case, options.out)


if __name__ == "__main__":
    main()
