"""Scenes of accelerate in which a model is trained: precision, accumulation, models, schedules."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DeepSpeedPlugin
from accelerate.utils import DummyOptim, DummyScheduler, ProjectConfiguration
from accelerate.utils.deepspeed import get_active_deepspeed_plugin
from scenes_common import (
    BATCH,
    LENGTH,
    WORDS,
    Words,
    accelerator_of,
    by_hand,
    dealt,
    first,
    fresh,
    loader,
    loss_of,
    message_of,
    plugin_of,
    trained,
)
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW

STEPS, RATE = 6, 1e-2


def adamw(params: Any) -> AdamW:
    return AdamW(params, lr=RATE, weight_decay=0.0)


class Measures(nn.Module):
    """Takes floats, which nobody has cast to the precision of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _mixed(precision: str, stage: int) -> dict[str, Any]:
    plugin = DeepSpeedPlugin(zero_stage=stage, gradient_clipping=1.0)
    accelerator = accelerator_of(plugin, mixed_precision=precision)
    model = fresh()
    expected = by_hand(model, dealt(STEPS), adamw, clip=1.0)
    model, optimizer, data = accelerator.prepare(model, adamw(model.parameters()), loader())
    batches = first(data, STEPS)
    logits = model(batches[0][0])
    losses = trained(accelerator, model, optimizer, batches)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    told = {
        "enabled": {key: config[key]["enabled"] for key in ("fp16", "bf16")},
        "dtype": str(next(model.module.parameters()).dtype),
        "logits": str(logits.dtype),
        "losses": losses,
        "expected": expected,
        "precision": accelerator.mixed_precision,
        "norm": type(accelerator.clip_grad_norm_(model.parameters(), 1.0)).__name__,
    }
    if precision == "fp16":
        told |= _overflow(accelerator, model, optimizer, batches[0][0])
    accelerator.free_memory(model, optimizer)
    return told


def _overflow(accelerator: Any, model: Any, optimizer: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Losses without bound: each step is skipped, and the scale falls."""
    before = [p.detach().clone() for p in model.module.parameters()]
    scales, skipped = [float(model.optimizer.loss_scale)], []
    for factor in (float("inf"), float("inf"), 1.0):
        accelerator.backward(loss_of(model, ids) * factor)
        skipped.append(bool(accelerator.optimizer_step_was_skipped))
        scales.append(float(model.optimizer.loss_scale))
        if factor != 1.0:
            pairs = zip(before, model.module.parameters(), strict=True)
            unchanged = all(torch.equal(a, b) for a, b in pairs)
    return {"skipped": skipped, "scales": scales, "unchanged": unchanged}


def fp16(out: Path) -> dict[str, Any]:
    """`mixed_precision="fp16"`, what the plugin makes of it, and steps that overflow."""
    return _mixed("fp16", 2)


def bf16(out: Path) -> dict[str, Any]:
    return _mixed("bf16", 2)


def bf16_stage3(out: Path) -> dict[str, Any]:
    return _mixed("bf16", 3)


def fp16_casts_inputs(out: Path) -> dict[str, Any]:
    """accelerate sets fp16.auto_cast: the model takes the fp32 batches of its loader."""
    plugin = DeepSpeedPlugin(zero_stage=1)
    accelerator = accelerator_of(plugin, mixed_precision="fp16")
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = BATCH
    model = Measures()
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
    said = model(torch.randn(BATCH, 4))
    accelerator.backward(said.float().square().mean())
    told = {"cast": model.fp16_auto_cast(), "said": str(said.dtype)}
    accelerator.free_memory(model, optimizer)
    return told


def accumulation(out: Path) -> dict[str, Any]:
    """Five micro-batches in steps of two: the end of the loader is the end of a step as well."""
    count = 5 * BATCH * 2
    accelerator = accelerator_of(plugin_of(2), gradient_accumulation_steps=2)
    model = fresh()
    ends = [1, 3, 4]
    expected = by_hand(
        model, dealt(5, count) * 2, adamw, accumulate=2, boundaries=[*ends, *(5 + e for e in ends)]
    )
    model, optimizer, data = accelerator.prepare(model, adamw(model.parameters()), loader(count))
    synced, steps, losses = [], [], []
    for _ in range(2):
        for (ids,) in data:
            with accelerator.accumulate(model):
                loss = loss_of(model, ids)
                accelerator.backward(loss)
                synced.append(accelerator.sync_gradients)
                optimizer.step()
                optimizer.zero_grad()
            steps.append(model.global_steps)
            losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    accelerator.free_memory(model, optimizer)
    return {"synced": synced, "steps": steps, "losses": losses, "expected": expected}


def accumulation_of_the_plugin(out: Path) -> dict[str, Any]:
    """The number in the configuration wins over the Accelerator's."""
    plugin = plugin_of(1, gradient_accumulation_steps=4)
    accelerator = accelerator_of(plugin, gradient_accumulation_steps=2)
    model = fresh()
    model, optimizer, data = accelerator.prepare(model, adamw(model.parameters()), loader())
    trained(accelerator, model, optimizer, first(data, 4))
    told = {
        "accelerator": accelerator.gradient_accumulation_steps,
        "engine": model.gradient_accumulation_steps(),
        "batch": accelerator.deepspeed_config["train_batch_size"],
        "steps": model.global_steps,
    }
    accelerator.free_memory(model, optimizer)
    return told


def backward_arguments(out: Path) -> dict[str, Any]:
    """What `accelerator.backward` is given reaches the engine."""
    accelerator = accelerator_of(plugin_of(2), gradient_accumulation_steps=2)
    model = fresh()
    expected = by_hand(model, [b for b in dealt(2) for _ in "ab"], adamw, accumulate=2)
    model, optimizer, data = accelerator.prepare(model, adamw(model.parameters()), loader())
    losses = []
    for (ids,) in first(data, 2):
        for index in range(2):
            with accelerator.accumulate(model):
                loss = loss_of(model, ids)
                if index:
                    accelerator.backward(loss / 2, retain_graph=True, scale_wrt_gas=False)
                else:
                    accelerator.backward(loss)
            losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    accelerator.free_memory(model, optimizer)
    return {"losses": losses, "expected": expected}


def no_sync(out: Path) -> dict[str, Any]:
    """`accelerator.no_sync(model)` around a forward, at every stage."""
    told = {}
    for stage in range(4):
        accelerator = accelerator_of(plugin_of(stage))
        model = fresh()
        model, optimizer, data = accelerator.prepare(model, adamw(model.parameters()), loader())
        with accelerator.no_sync(model):
            told[stage] = bool(torch.isfinite(loss_of(model, next(iter(data))[0])))
        accelerator.free_memory(model, optimizer)
    return told


def _with_schedule(plugin: Any, optimizer_of: Any, schedule_of: Any) -> dict[str, Any]:
    accelerator = accelerator_of(plugin)
    model = fresh()
    optimizer = optimizer_of(model.parameters())
    schedule = schedule_of(optimizer)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, loader(), schedule)
    rates, losses = [], []
    for (ids,) in first(data, STEPS):
        loss = loss_of(model, ids)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    told = {
        "rates": rates,
        "losses": losses,
        "last": schedule.get_last_lr(),
        "wrapper": type(schedule).__name__,
        "inner": type(model.basic_optimizer).__name__,
        "config": accelerator.deepspeed_config.get("scheduler"),
        "betas": list(optimizer.param_groups[0].get("betas", ())),
        "decay": optimizer.param_groups[0]["weight_decay"],
    }
    accelerator.free_memory(model, optimizer, schedule)
    return told


def _dummy(params: Any) -> DummyOptim:
    return DummyOptim(params, lr=RATE, weight_decay=0.125)


AUTO_OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}


def dummies(out: Path) -> dict[str, Any]:
    """Optimizer and schedule of the file, "auto" from the dummies."""
    scheduler = {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
            "warmup_type": "linear",
        },
    }
    plugin = plugin_of(2, optimizer=AUTO_OPTIMIZER, scheduler=scheduler)
    return _with_schedule(
        plugin, _dummy, lambda o: DummyScheduler(o, total_num_steps=20, warmup_num_steps=2)
    )


def dummy_without_warmup(out: Path) -> dict[str, Any]:
    """DummyScheduler's default, no step of warmup, of which accelerate makes one."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}
    plugin = plugin_of(2, optimizer=AUTO_OPTIMIZER, scheduler=scheduler)
    return _with_schedule(plugin, _dummy, DummyScheduler)


def dummy_groups(out: Path) -> dict[str, Any]:
    """DummyOptim with groups, as the examples of accelerate make them."""
    accelerator = accelerator_of(plugin_of(2, optimizer=AUTO_OPTIMIZER))
    model = fresh()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.5},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    model, optimizer, _ = accelerator.prepare(model, DummyOptim(groups, lr=RATE), loader())
    told = {"decays": [group["weight_decay"] for group in optimizer.param_groups]}
    accelerator.free_memory(model, optimizer)
    return told


def schedule_callable(out: Path) -> dict[str, Any]:
    """DummyScheduler with a callable that makes the schedule."""

    def make(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    plugin = plugin_of(2, optimizer=AUTO_OPTIMIZER)
    return _with_schedule(plugin, _dummy, lambda o: DummyScheduler(o, lr_scheduler_callable=make))


def schedule_of_deepspeed(out: Path) -> dict[str, Any]:
    """An object of a class in VALID_LR_SCHEDULES goes to the engine, which steps it."""
    from deepspeed.runtime.lr_schedules import WarmupLR

    def make(optimizer: Any) -> Any:
        return WarmupLR(optimizer, 0.0, RATE, warmup_num_steps=4, warmup_type="linear")

    return _with_schedule(plugin_of(2), adamw, make)


def schedule_of_transformers(out: Path) -> dict[str, Any]:
    """The schedule of a library; accelerate steps it once for each process."""
    from transformers import get_scheduler

    def make(optimizer: Any) -> Any:
        return get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=20)

    return _with_schedule(plugin_of(2), adamw, make)


def offloaded(out: Path) -> dict[str, Any]:
    """Which optimizer is used under CPU offload, for what the program makes."""
    told = {}
    for name, make in {
        "AdamW": adamw,
        "Adam": lambda params: Adam(params, lr=RATE, weight_decay=0.1),
        "SGD": lambda params: SGD(params, lr=RATE),
        "Adagrad": lambda params: Adagrad(params, lr=RATE),
        "kept": adamw,
    }.items():
        zero = {"offload_optimizer": {"device": "cpu"}}
        extra = {"zero_force_ds_cpu_optimizer": False} if name == "kept" else {}
        accelerator = accelerator_of(plugin_of(2, zero=zero, **extra))
        model = fresh()
        # What accelerate makes of it: Adam, in whose mode without decoupled decay.
        acts = Adagrad if name == "Adagrad" else AdamW if name in ("AdamW", "kept") else Adam
        decay = 0.1 if name == "Adam" else 0.0
        reference = partial(acts, lr=RATE, weight_decay=decay)
        expected = by_hand(model, dealt(STEPS), reference)
        optimizer = make(model.parameters())
        model, optimizer, data = accelerator.prepare(model, optimizer, loader())
        inner = model.basic_optimizer
        losses = trained(accelerator, model, optimizer, first(data, STEPS))
        told[name] = {
            "inner": type(inner).__name__,
            "decoupled": inner.defaults.get("adamw_mode", getattr(inner, "adam_w_mode", None)),
            "losses": losses,
            "expected": expected,
        }
        accelerator.free_memory(model, optimizer)
    return told


def two_models(out: Path) -> dict[str, Any]:
    """Two plugins, two engines trained by two Accelerators, in one block."""
    plugins = {"zero2": plugin_of(2), "zero3": plugin_of(3)}
    one = accelerator_of(plugins)
    two = type(one)()
    model = fresh()
    expected = by_hand(model, dealt(STEPS), adamw, clip=1.0)
    model1, optimizer1, data = one.prepare(model, adamw(model.parameters()), loader())
    two.state.select_deepspeed_plugin("zero3")
    sizes = plugins["zero2"].deepspeed_config["train_micro_batch_size_per_gpu"]
    plugins["zero3"].deepspeed_config["train_micro_batch_size_per_gpu"] = sizes
    model = fresh()
    model2, optimizer2 = two.prepare(model, adamw(model.parameters()))
    told: dict[str, Any] = {
        "is_active": get_active_deepspeed_plugin(two.state) is plugins["zero3"],
        "is_own": [
            one.deepspeed_engine_wrapped.engine is model1,
            two.deepspeed_engine_wrapped.engine is model2,
        ],
        "stages": [model1.zero_optimization_stage(), model2.zero_optimization_stage()],
        "losses1": [],
        "losses2": [],
        "expected": expected,
    }
    for (ids,) in first(data, STEPS):
        with one.accumulate(model1, model2):
            for name, accelerator, model, optimizer in (
                ("losses1", one, model1, optimizer1),
                ("losses2", two, model2, optimizer2),
            ):
                loss = loss_of(model, ids)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                told[name].append(float(accelerator.reduce(loss.detach(), "mean")))
    one.free_memory(model1, optimizer1)
    two.free_memory(model2, optimizer2)
    return told


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.1))

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.factor


def judged(out: Path) -> dict[str, Any]:
    """A model trains while another, at stage 3 without an optimizer, only runs; both are saved."""
    plugins = {"training": plugin_of(2), "inference": plugin_of(3)}
    plugins["inference"].deepspeed_config["train_micro_batch_size_per_gpu"] = BATCH
    accelerator = accelerator_of(plugins)
    model = fresh()
    expected = by_hand(model, dealt(STEPS), adamw)
    model, optimizer, data = accelerator.prepare(model, adamw(model.parameters()), loader())
    accelerator.state.select_deepspeed_plugin("inference")
    judge = accelerator.prepare(Noise())
    judge.eval()
    accelerator.state.select_deepspeed_plugin("training")
    losses = []
    for (ids,) in first(data, STEPS):
        loss = loss_of(model, ids)
        with torch.no_grad():
            noise = judge(loss)
        accelerator.backward(loss + noise)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    told = {
        "is_first": accelerator.deepspeed_engine_wrapped.engine is model,
        "optimizers": len(accelerator._optimizers),
        "noise": float(noise / loss.detach()),
        "losses": losses,
        "expected": expected,
    }
    accelerator.free_memory(model, optimizer, judge)
    return told


def saved_states(out: Path) -> dict[str, Any]:
    """`save_state` of two engines with automatic names and keywords, and `load_state` of them."""
    folder = out / "states"
    plugins = {"one": plugin_of(2), "two": plugin_of(3)}
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=1)
    accelerator = accelerator_of(plugins, project_config=project)
    model = fresh()
    model.embed.weight.requires_grad_(False)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    model1, optimizer1, data = accelerator.prepare(model, optimizer, loader())
    accelerator.state.select_deepspeed_plugin("two")
    plugins["two"].deepspeed_config["train_micro_batch_size_per_gpu"] = BATCH
    model = fresh(6)
    model2, optimizer2 = accelerator.prepare(model, adamw(model.parameters()))
    batches = first(data, STEPS)

    def losses(count: int) -> list[float]:
        told = []
        for model in (model1, model2):
            for (ids,) in batches[:count]:
                loss = loss_of(model, ids)
                model.backward(loss)
                model.step()
                told.append(float(accelerator.reduce(loss.detach(), "mean")))
        return told

    losses(2)
    for _ in range(2):
        accelerator.save_state(exclude_frozen_parameters=True)
    there = losses(3)
    accelerator.load_state(load_module_strict=False)
    again = losses(3)
    accelerator.load_state(str(folder / "checkpoints" / "checkpoint_1"), load_module_strict=False)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    inside = sorted(path.name for path in (folder / "checkpoints" / names[-1]).iterdir())
    accelerator.free_memory(model1, optimizer1, model2, optimizer2)
    return {"there": there, "again": again, "names": names, "inside": inside}


def compiled(out: Path) -> dict[str, Any]:
    """The whole model, and its blocks alone."""
    from accelerate.utils import TorchDynamoPlugin

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(WORDS, 8)
            self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
            self.head = nn.Linear(8, WORDS)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = torch.tanh(block(x))
            return self.head(x)

    told: dict[str, Any] = {}
    for name, stage in (("whole", 2), ("regions", 2), ("regions3", 3)):
        regional = name != "whole"
        dynamo = TorchDynamoPlugin(backend="eager", use_regional_compilation=regional)
        accelerator = accelerator_of(plugin_of(stage), dynamo_plugin=dynamo)
        torch.manual_seed(4)
        model = Stack()
        expected = by_hand(model, dealt(STEPS), adamw)
        model, optimizer, data = accelerator.prepare(model, adamw(model.parameters()), loader())
        told[name] = {
            "losses": trained(accelerator, model, optimizer, first(data, STEPS)),
            "expected": expected,
            "is_compiled": bool(model.is_compiled),
            "blocks": [b._compiled_call_impl is not None for b in model.module.blocks],
        }
        accelerator.free_memory(model, optimizer)
    return told


def evaluated(out: Path) -> dict[str, Any]:
    """`prepare` of a model and a loader to evaluate on: no optimizer, at stages 0 and 3."""
    told: dict[str, Any] = {}
    for stage in (0, 3):
        accelerator = accelerator_of(plugin_of(stage))
        plain = fresh()
        ids = rows_of(22)
        with torch.no_grad():
            expected = plain(ids).argmax(-1)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=BATCH)
        model, data = accelerator.prepare(fresh(), data)
        model.eval()
        found = []
        for (batch,) in data:
            with torch.no_grad():
                said = model(batch).argmax(-1)
            found.append(accelerator.gather_for_metrics(said))
        told[str(stage)] = {
            "same": torch.equal(torch.cat(found), expected),
            "optimizers": len(accelerator._optimizers),
            "engine": type(model).__name__,
            "has_optimizer": model.optimizer is not None,
            "training": model.training or model.module.training,
            "is_module": accelerator.unwrap_model(model) is model.module,
        }
        accelerator.free_memory(model)
    accelerator = accelerator_of(plugin_of(3))
    told["loader"] = type(accelerator.prepare(loader())).__name__
    told["no_batch_size"] = message_of(lambda: accelerator.prepare(Words()))
    return told


def rows_of(count: int) -> torch.Tensor:
    return torch.arange(count * LENGTH).reshape(count, LENGTH) % WORDS


SCENES = {
    scene.__name__: scene
    for scene in (
        fp16,
        bf16,
        bf16_stage3,
        fp16_casts_inputs,
        accumulation,
        accumulation_of_the_plugin,
        backward_arguments,
        no_sync,
        dummies,
        dummy_without_warmup,
        dummy_groups,
        schedule_callable,
        schedule_of_deepspeed,
        schedule_of_transformers,
        offloaded,
        two_models,
        judged,
        saved_states,
        compiled,
        evaluated,
    )
}
