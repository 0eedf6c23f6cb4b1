"""Do curricula, token dropping, layer dropping and batches by tokens reach the same loss with less?

A GPT of 0.71 M parameters learns Python's standard library byte by byte, from three starts. All
methods get the same number of FLOPs, the same peak learning rate and the same decay of it over the
FLOPs spent. What is asked is how many FLOPs (and tokens) a method needs until its loss on held-out
text is that of the baseline at its end, for the same start. The learning rate is the best one of
a sweep of the baseline; the methods run with it as it is.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import ds_core
from ds_core.data import analyze, pad_collate, sequence_length
from models import Block
from report import Report, main

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gpt"))
import corpus

VOCAB, WIDTH, DEPTH, HEADS, CONTEXT, BATCH = 257, 96, 6, 4, 128, 8
PAD, IGNORED = 256, -100
WARMUP, FLOOR = 0.05, 0.1
STEPS, PEAK_LRS = 400, (5e-4, 1e-3, 2e-3, 4e-3)
SEEDS = (1, 2, 3)
CORPUS_BYTES = 4_000_000
#: Shares of the budget at which a run is evaluated.
EVALUATED_AT = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
HELD_OUT_SAMPLES = 256


class GPT(nn.Module):
    """Maps bytes and the bytes that follow them to the mean loss in nats per byte."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            for last in (block.out, block.down):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * DEPTH))
        self.flops = _FlopCount(self.blocks)

    def forward(self, inputs_bt: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
        batch, tokens = inputs_bt.shape
        x_btd = self.token(inputs_bt) + self.position(torch.arange(tokens))
        for block in self.blocks:
            x_btd = block(x_btd)
        logits = self.norm(x_btd) @ self.token.weight.T
        if self.training:
            self.flops.outside(batch * tokens)
        return F.cross_entropy(logits.flatten(0, 1), targets_bt.flatten(), ignore_index=IGNORED)


class _FlopCount:
    """Multiplications and additions of forward and backward, as the blocks are really called."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.total = 0.0
        self.tokens = 0
        for block in blocks:
            block.register_forward_pre_hook(self._block)

    def _block(self, block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if block.training:
            batch, tokens, width = args[0].shape
            # 12 d^2 weights; scores and sums of attention, whole squares as they are computed.
            self.total += 3 * batch * tokens * (24 * width**2 + 4 * tokens * width)

    def outside(self, tokens: int) -> None:
        self.tokens += tokens
        self.total += 3 * tokens * 2 * WIDTH * VOCAB


class ByteWindows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Stretches of 128 bytes, side by side, and what follows each byte."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def __len__(self) -> int:
        return (len(self.data) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * CONTEXT
        window = torch.from_numpy(self.data[start : start + CONTEXT + 1].astype(np.int64))
        return window[:-1], window[1:]


class Paragraphs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What stands between empty lines, of 8 to 129 bytes: samples of very different lengths."""

    def __init__(self, text: str) -> None:
        pieces = [piece.strip("\n").encode()[: CONTEXT + 1] for piece in text.split("\n\n")]
        self.pieces = [piece for piece in pieces if len(piece) >= 8]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.tensor(list(self.pieces[index]))
        return found[:-1], found[1:]


class WordRarity:
    """Minus the sum of the logarithms of the frequencies of a sample's words."""

    def __init__(self, data: np.ndarray) -> None:
        self._counts = Counter(bytes(data.astype(np.uint8)).split())
        self._total = sum(self._counts.values())

    def __call__(self, sample: tuple[torch.Tensor, torch.Tensor]) -> float:
        words = bytes(sample[0].tolist()).split()
        return -sum(math.log(max(1, self._counts[word]) / self._total) for word in words)


class DecayByFlops:
    """Warm-up, then a half cosine, over the share of the FLOPs that are spent."""

    def __init__(self, optimizer: torch.optim.Optimizer, count: _FlopCount, budget: float) -> None:
        self._groups, self._count, self._budget = optimizer.param_groups, count, budget
        self._peaks = [group["lr"] for group in self._groups]
        self.step()

    def step(self) -> None:
        share = min(1.0, self._count.total / self._budget)
        factor = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share))
        factor *= min(1.0, (share + 0.002) / WARMUP)
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def state_dict(self) -> dict[str, Any]:
        return {}


@dataclass
class Curve:
    """Held-out loss of one run, against what was spent."""

    flops: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    processor_s: float = 0.0

    def reach(self, loss: float) -> tuple[float, float] | None:
        """FLOPs and tokens at which the loss was first reached, interpolated; None: never."""
        for place in range(1, len(self.losses)):
            before, after = self.losses[place - 1], self.losses[place]
            if after <= loss:
                part = min(1.0, (before - loss) / max(before - after, 1e-12))
                flops = self.flops[place - 1] + part * (self.flops[place] - self.flops[place - 1])
                tokens = self.tokens[place - 1] + part * (
                    self.tokens[place] - self.tokens[place - 1]
                )
                return flops, tokens
        return None


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        label: for the table.
        section: what the config gets, given the number of the baseline's steps and the folder of
            the analysis.
        data: "windows" or "paragraphs".
    """

    label: str
    section: Any
    data: str = "windows"


def _nothing(steps: int, folder: Path) -> dict[str, Any]:
    return {}


def _short_first(steps: int, folder: Path) -> dict[str, Any]:
    rule = {"total_curriculum_step": round(0.4 * steps), "difficulty_step": 8}
    return {
        "curriculum_learning": {
            "enabled": True, "min_difficulty": 32, "max_difficulty": CONTEXT,
            "schedule_type": "fixed_linear", "schedule_config": rule,
        }
    }  # fmt: skip


def _common_words_first(steps: int, folder: Path) -> dict[str, Any]:
    rule = {"total_curriculum_step": round(0.4 * steps), "difficulty_step": 1, "root_degree": 2}
    metric = {
        "index_to_sample_path": str(folder / "rarity"), "difficulty_type": "percentile",
        "min_difficulty": 10, "max_difficulty": 100, "schedule_type": "fixed_root",
        "schedule_config": rule,
    }  # fmt: skip
    curriculum = {"enabled": True, "curriculum_metrics": {"rarity": metric}}
    sampling = {"enabled": True, "curriculum_learning": curriculum}
    return {"data_efficiency": {"enabled": True, "data_sampling": sampling}}


def _random_ltd(steps: int, folder: Path) -> dict[str, Any]:
    growth = {"require_steps": round(0.7 * steps), "seq_per_step": 8}
    rule = {
        "enabled": True, "total_layer_num": DEPTH, "random_ltd_layer_num": DEPTH - 2,
        "random_ltd_layer_id": list(range(1, DEPTH - 1)),
        "random_ltd_schedule": {
            "min_value": 64, "max_value": CONTEXT, "schedule_config": growth,
        },
    }  # fmt: skip
    routing = {"enabled": True, "random_ltd": rule}
    return {"data_efficiency": {"enabled": True, "data_routing": routing}}


def _layer_drop(steps: int, folder: Path) -> dict[str, Any]:
    # As in the paper, theta is all but reached after a tenth of the run.
    return {"progressive_layer_drop": {"enabled": True, "theta": 0.5, "gamma": 100 / steps / 2}}


def _by_tokens(order: str, scaling: str) -> Any:
    def section(steps: int, folder: Path) -> dict[str, Any]:
        batching = {
            "enabled": True, "metrics_path": str(folder), "max_tokens": _PARAGRAPH_TOKENS,
            "sequence_picking_order": order, "lr_scaling_method": scaling,
        }  # fmt: skip
        sampling = {"enabled": True, "dynamic_batching": batching}
        return {"data_efficiency": {"enabled": True, "data_sampling": sampling}}

    return section


_PARAGRAPH_TOKENS = 850
METHODS = {
    "baseline": Method("baseline", _nothing),
    "seqlen": Method("sequence-length warm-up (32 to 128)", _short_first),
    "rarity": Method("curriculum by word rarity (10% to 100%)", _common_words_first),
    "random-ltd": Method("random-LTD (64 to 128 tokens, 4 of 6 blocks)", _random_ltd),
    "layer-drop": Method("progressive layer dropping (theta 0.5)", _layer_drop),
    "paragraphs": Method("baseline, padded paragraphs", _nothing, "paragraphs"),
    "bucketed": Method(
        "batches by tokens, neighbours of like length, linear LR",
        _by_tokens("bucketed", "linear"),
        "paragraphs",
    ),
    "bucketed-unscaled": Method(
        "batches by tokens, neighbours of like length, LR not scaled",
        _by_tokens("bucketed", "none"),
        "paragraphs",
    ),
}


class Bench:
    """The text, its analysis, and runs on it.

    Args:
        folder: for the analysis.
        steps: optimizer steps of the baseline.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        text = corpus.read(None, CORPUS_BYTES)
        self.summary = text.summary
        training, heldout = ("\n".join(part) for part in (text.train, text.heldout))
        as_bytes = [np.frombuffer(part.encode(), np.uint8) for part in (training, heldout)]
        self.data: dict[str, tuple[Any, Any]] = {
            "windows": tuple(map(ByteWindows, as_bytes)),
            "paragraphs": (Paragraphs(training), Paragraphs(heldout)),
        }
        windows, paragraphs = self.data["windows"][0], self.data["paragraphs"][0]
        analyze(windows, {"rarity": WordRarity(windows.data)}, folder, overwrite=True)
        analyze(paragraphs, {"seqlen": sequence_length}, folder, overwrite=True)
        model = GPT()
        model.train()(*map(torch.stack, zip(*[windows[i] for i in range(BATCH)], strict=True)))
        self.budget = model.flops.total * steps

    def run(self, name: str, seed: int, peak_lr: float) -> Curve:
        """Train until the budget is spent; the model is evaluated at even shares of it."""
        method = METHODS[name]
        training, heldout = self.data[method.data]
        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": peak_lr, "betas": [0.9, 0.95], "weight_decay": 0.1},
            },
            "seed": seed,
            "dataloader_drop_last": True,
            **method.section(self.steps, self.folder),
        }
        if "data_efficiency" in config:
            config["data_efficiency"]["seed"] = seed
        torch.manual_seed(seed)
        model = GPT()
        engine = ds_core.initialize(
            model, config, training_data=training,
            collate_fn=pad_collate(PAD, IGNORED) if method.data == "paragraphs" else None,
            lr_scheduler=lambda optimizer: DecayByFlops(optimizer, model.flops, self.budget),
        )  # fmt: skip
        batches = list(_heldout_batches(heldout))
        curve = Curve()
        for share in EVALUATED_AT:
            began = time.process_time()
            while model.flops.total < share * self.budget:
                engine.train_batch()
            curve.processor_s += time.process_time() - began
            curve.losses.append(_evaluate(model, batches))
            curve.flops.append(model.flops.total)
            curve.tokens.append(model.flops.tokens)
        curve.steps = engine.global_step
        engine.close()
        return curve


def _heldout_batches(dataset: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Samples spread evenly, the same ones every time."""
    chosen = np.linspace(0, len(dataset) - 1, HELD_OUT_SAMPLES).astype(int)
    collate = pad_collate(PAD, IGNORED)
    for start in range(0, len(chosen), 64):
        yield collate([dataset[int(index)] for index in chosen[start : start + 64]])


@torch.no_grad()
def _evaluate(model: GPT, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean loss over all held-out bytes."""
    model.eval()
    total, count = 0.0, 0
    for inputs, targets in batches:
        known = int((targets != IGNORED).sum())
        total += float(model(inputs, targets)) * known
        count += known
    model.train()
    return total / count


def _runs_of(seed: int, steps: int, folder: str, peak_lrs: dict[str, float]) -> dict[str, Any]:
    """All methods from one start, one after the other; in a process of its own."""
    torch.set_num_threads(1)
    bench = Bench(Path(folder) / f"seed{seed}", steps)
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        curve = bench.run(name, seed, peak_lrs[method.data])
        found[name] = asdict(curve)
        print(f"{name}, start {seed}: {curve.losses[-1]:.4f}", file=sys.stderr, flush=True)
    return {"runs": found, "text": bench.summary, "budget": bench.budget}


def _sweep(data: str, peak_lr: float, steps: int, folder: str) -> float:
    """The loss of a baseline at the end, for one learning rate; start 0, which is not counted."""
    torch.set_num_threads(1)
    name = next(name for name, method in METHODS.items() if method.data == data)
    loss = Bench(Path(folder) / f"{data}{peak_lr}", steps).run(name, 0, peak_lr).losses[-1]
    print(f"{name}, learning rate {peak_lr}: {loss:.4f}", file=sys.stderr, flush=True)
    return loss


def run(quick: bool = False) -> Report:
    """FLOPs and tokens that each method needs for the baseline's held-out loss, from 3 starts."""
    steps = 40 if quick else STEPS
    rates = PEAK_LRS[1:2] if quick else PEAK_LRS
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(3, context) as pool:
        sweep = {
            data: {lr: pool.submit(_sweep, data, lr, steps, folder) for lr in rates}
            for data in ("windows", "paragraphs")
        }
        swept = {data: {lr: f.result() for lr, f in each.items()} for data, each in sweep.items()}
        best = {data: min(each, key=each.__getitem__) for data, each in swept.items()}
        parts = [pool.submit(_runs_of, seed, steps, folder, best) for seed in SEEDS]
        found = [part.result() for part in parts]
    return _report(steps, found, swept)


def _report(
    steps: int, found: list[dict[str, Any]], swept: dict[str, dict[float, float]]
) -> Report:
    best = {data: min(each, key=each.__getitem__) for data, each in swept.items()}
    report = Report(
        "data_efficiency",
        f"FLOPs and tokens to a baseline's held-out loss: {len(SEEDS)} starts, "
        f"{found[0]['budget'] / 1e12:.2f} TFLOP each",
        ["method", "loss at equal FLOPs", "minus baseline's", "FLOPs to its loss", "tokens to it"],
    )
    curves = [{name: Curve(**c) for name, c in part["runs"].items()} for part in found]
    for name in METHODS:
        report.rows.append(_row(name, curves))
    report.notes += [
        f"Text: {found[0]['text']}. Model: {sum(p.numel() for p in GPT().parameters()):,} "
        f"parameters, {DEPTH} blocks of width {WIDTH}, {CONTEXT} bytes, {BATCH} sequences a step, "
        f"{steps} steps of the baseline.",
        "Mean and, after ±, half the range over the starts. FLOPs and tokens are shares of the "
        "baseline's own, for the same start; tokens are those that the model is called with, "
        "padding included. A share is where the held-out loss first is the baseline's at its end, "
        "between evaluations by a straight line; the learning rate has not decayed fully there.",
        "Peak learning rates, the best of a sweep of the baselines from another start: "
        + "; ".join(
            f"{data} {best[data]:g} ("
            + ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in swept[data].items())
            + ")"
            for data in swept
        )
        + ".",
    ]
    flat = [
        statistics.mean(each[name].losses[EVALUATED_AT.index(0.8)] - each[name].losses[-1]
                        for each in curves)
        for name in ("baseline", "paragraphs")
    ]  # fmt: skip
    report.notes.append(
        f"The baselines are flat towards the end: at 0.8 of the FLOPs they are {flat[0]:.3f} and "
        f"{flat[1]:.3f} above their last loss, so a small gain in loss is a large one in FLOPs."
    )
    report.raw = {"starts": found, "sweep": swept}
    return report


def _row(name: str, curves: list[dict[str, Curve]]) -> list[str]:
    method = METHODS[name]
    reference = next(other for other, each in METHODS.items() if each.data == method.data)
    ends = [each[name].losses[-1] for each in curves]
    if name == reference:
        return [method.label, _spread(ends), "-", "1", "1"]
    apart = [each[name].losses[-1] - each[reference].losses[-1] for each in curves]
    reached = [each[name].reach(each[reference].losses[-1]) for each in curves]
    told = ["does not reach it"] * 2
    shares = [
        [spent[kind] / whole for spent, whole in zip(reached, wholes, strict=True) if spent]
        for kind, wholes in enumerate(
            (
                [each[reference].flops[-1] for each in curves],
                [each[reference].tokens[-1] for each in curves],
            )
        )
    ]
    count = len(shares[0])
    if count:
        note = "" if count == len(curves) else f" ({count} of {len(curves)} starts; else never)"
        told = [_spread(values) + note for values in shares]
    return [method.label, _spread(ends), _spread(apart), *told]


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


if __name__ == "__main__":
    main(run)
