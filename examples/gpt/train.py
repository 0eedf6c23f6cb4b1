"""Train a GPT on real text, on any number of processes and at any ZeRO stage.

    ds run --nproc 2 examples/gpt/train.py --config examples/gpt/zero2.json

The way through this file is `train`; the config says how the work is shared, and nothing else here
depends on it. README.md has the options and the figures that were measured.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import corpus
import plot
import run_folder
import text
import torch
from errors import ExampleError, on_rank_0
from evaluate import HeldOut, evaluate
from model import GPT, SIZES
from run_folder import Settings
from run_log import RunLog, memory
from sample import generate

import ds_core
import ds_zero
from ds_core import comm
from ds_core.config import Config
from ds_core.errors import CheckpointError, ConfigError

HERE = Path(__file__).parent
DEFAULT_STEPS = 400


def train(options: argparse.Namespace) -> None:
    """Train, evaluate, save, sample and draw, as the options say."""
    comm.init(timeout_s=1800)  # the others wait while rank 0 tokenizes
    group = comm.Mesh.world().group("dp")
    config = ds_core.config.load(options.config, world_size=group.size)
    config, num_steps = _schedule(config, options.steps)
    folder, settings, tokens = _prepare(options, group)
    training = text.Windows(tokens.train, settings.seq_tokens, multiple_of=config.train_batch_size)
    heldout = text.Windows(tokens.heldout, settings.seq_tokens)
    _check_enough(training, heldout, config, settings)
    log = RunLog(
        folder / "metrics.jsonl",
        group,
        step_tokens=config.train_batch_size * settings.seq_tokens,
        every_steps=config.steps_per_print or 10,
    )
    log.say(f"run: {folder}")

    torch.manual_seed(config.seed or 0)
    stage = getattr(config.section("zero_optimization"), "stage", 0)
    # At stage 3 the model is born sharded: its full weights never exist on one rank.
    with ds_zero.Init(enabled=stage == 3):
        model = _model(settings, tokens.vocab_size, recomputes=options.recompute)
    log.say(f"model: {settings.size}, {_num_parameters(model) / 1e6:.2f} M parameters")
    engine = ds_core.initialize(model, config, training_data=training, observers=(log,))
    checkpoints = folder / "checkpoints"
    if options.restarted and (checkpoints / "latest").exists():
        # Whatever ended the run may have harmed its last checkpoint.
        engine.load_checkpoint(checkpoints, ds_core.checkpoint.newest_intact(checkpoints))
    elif options.resume is not None and not options.restarted:
        engine.load_checkpoint(checkpoints, options.resume or None)

    def measure() -> HeldOut:
        found = evaluate(engine, heldout, tokens.bytes_of, max_windows=options.eval_windows)
        log.evaluated(engine, found)
        return found

    started, start_step = time.perf_counter(), engine.global_step
    first = last = measure()
    while engine.global_step < num_steps:
        engine.train_batch()
        is_last = engine.global_step == num_steps
        if is_last or engine.global_step % options.eval_every == 0:
            last = measure()
        if is_last or engine.global_step % options.save_every == 0:
            engine.save_checkpoint(checkpoints)

    seconds, steps = time.perf_counter() - started, engine.global_step - start_step
    log.say(f"held-out text: {first} -> {last}, in {steps} steps and {seconds:.0f} s")
    for rank, used in enumerate(comm.all_gather_object(memory(engine), group)):
        log.say(f"rank {rank}: {used}")
    engine.eval()
    # All ranks run the model, because at stage 3 each holds a part of it.
    told = _continued(engine, options.prompt, folder, settings, options.sample_tokens)
    log.say(f"a sample, continuing {options.prompt!r}:\n{told}")
    engine.close()
    if group.rank == 0:
        ranks = "1 rank" if group.size == 1 else f"{group.size} ranks"
        _draw(folder, f"GPT {settings.size}, ZeRO stage {stage}, {ranks}")


def continue_prompt(options: argparse.Namespace) -> None:
    """Print a continuation of `--sample` by the model of a finished or interrupted run."""
    comm.init()
    group = comm.Mesh.world().group("dp")
    folder, settings = on_rank_0(lambda: run_folder.of_old_run(options.out, {}), group)
    vocab_size = text.load_tokenizer(folder).get_vocab_size()
    model = _model(settings, vocab_size).eval()
    state = {"model": dict(model.named_parameters())}
    ds_core.checkpoint.load(
        folder / "checkpoints", options.resume or None, state=state, parts=["model"]
    )
    told = _continued(model, options.sample, folder, settings, options.sample_tokens)
    if group.rank == 0:
        print(told, flush=True)


# --- Steps of the above ---------------------------------------------------------------------------


def _prepare(options: argparse.Namespace, group: comm.Group) -> tuple[Path, Settings, text.Tokens]:
    """The run's folder and settings, and its tokens: made by rank 0, read by all."""
    given = _given(options)

    def prepare() -> tuple[Path, Settings]:
        is_new = options.resume is None
        find = run_folder.of_new_run if is_new else run_folder.of_old_run
        folder, settings = find(options.out, given)
        cap = None if settings.max_mb is None else round(settings.max_mb * 1e6)
        content = corpus.read(settings.data, cap)
        print(f"text: {content.summary}", flush=True)
        began = time.perf_counter()
        try:
            digest = text.prepare(content, settings.vocab, folder.parent)
        except OSError as error:
            where = str(folder.parent)
            raise ExampleError(f"cannot write to {where!r}: {error.strerror}") from error
        seconds = time.perf_counter() - began
        print(f"tokens: {folder.parent / f'text-{digest}'} ({seconds:.1f} s)", flush=True)
        if not is_new and digest != settings.text:
            raise ExampleError(
                f"the text of the run in {str(folder)!r} has changed since it was started; bring "
                f"it back, or start a new run"
            )
        settings = replace(settings, text=digest)
        run_folder.write(folder, settings, folder.parent / f"text-{digest}")
        return folder, settings

    folder, settings = on_rank_0(prepare, group)
    return folder, settings, text.load(folder.parent, settings.text)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names."""
    names = ("size", "seq_tokens", "vocab", "untied", "data", "max_mb")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _schedule(config: Config, steps: int | None) -> tuple[Config, int]:
    """The number of steps, and the config with its schedule stretched to that many."""
    scheduler = config.scheduler
    planned = scheduler.params.get("total_num_steps") if scheduler else None
    if scheduler is None or planned is None or steps in (None, planned):
        return config, steps or planned or DEFAULT_STEPS
    params = dict(scheduler.params, total_num_steps=steps)
    if "warmup_num_steps" in params:
        params["warmup_num_steps"] = max(2, params["warmup_num_steps"] * steps // planned)
    stretched = scheduler.model_copy(update={"params": params})
    return config.model_copy(update={"scheduler": stretched}), steps


def _check_enough(
    training: text.Windows, heldout: text.Windows, config: Config, settings: Settings
) -> None:
    if not len(training) or not len(heldout):
        raise ExampleError(
            f"the text is too short: a step needs {config.train_batch_size} windows of "
            f"{settings.seq_tokens} tokens to train on, and an evaluation one that is held out; "
            f"give more text, or lower --seq-tokens or the batch size"
        )


def _model(settings: Settings, vocab_size: int, *, recomputes: bool = False) -> GPT:
    return GPT(
        SIZES[settings.size],
        vocab_size,
        settings.seq_tokens,
        is_tied=not settings.untied,
        recomputes=recomputes,
    )


def _num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _continued(
    model: torch.nn.Module, prompt: str, folder: Path, settings: Settings, num_tokens: int
) -> str:
    return generate(
        model,
        text.load_tokenizer(folder),
        prompt,
        max_context=settings.seq_tokens,
        num_tokens=num_tokens,
        device=next(model.parameters()).device,
    )


def _draw(folder: Path, title: str) -> None:
    try:
        plot.draw(folder / "metrics.jsonl", folder / "loss.png", title)
    except ExampleError as error:
        print(error, flush=True)
        return
    print(f"loss curve: {folder / 'loss.png'}", flush=True)


# --- The command line -----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train a GPT on text. Start it by ds run or torchrun."
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--config", default=str(HERE / "zero2.json"), help="JSON config (zero2.json)")
    run.add_argument("--out", help="folder of the run (runs/gpt-NNN, the next free number)")
    run.add_argument("--steps", type=_positive, help="optimizer steps (as the config's schedule)")
    run.add_argument("--eval-every", type=_positive, default=50, help="steps (50)")
    run.add_argument("--eval-windows", type=_positive, default=128, help="held-out windows (128)")
    run.add_argument("--save-every", type=_positive, default=100, help="steps (100)")
    run.add_argument(
        "--resume", nargs="?", const="", metavar="TAG",
        help="go on with the run in --out (the newest), from its latest checkpoint or TAG",
    )  # fmt: skip
    run.add_argument("--prompt", default="def main(", help="what the sample at the end continues")
    run.add_argument("--sample", metavar="PROMPT", help="only continue PROMPT, by a run's model")
    run.add_argument("--sample-tokens", type=_positive, default=96, help="its length (96)")
    run.add_argument("--recompute", action="store_true", help="keep no activations of blocks")
    model = parser.add_argument_group("the model and its text (a resumed run keeps its own)")
    model.add_argument("--size", choices=SIZES, help="number of parameters (10m)")
    model.add_argument("--seq-tokens", type=_positive, help="tokens per sample (128)")
    model.add_argument("--vocab", type=_vocabulary, help="token ids, at least 257 (4096)")
    model.add_argument("--untied", action="store_true", default=None, help="own output weights")
    model.add_argument("--data", nargs="+", metavar="PATH", help="text files and folders")
    model.add_argument("--max-mb", type=_megabytes, help="most text to use, in MB")
    return parser


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected 1 or more")
    return number


def _vocabulary(value: str) -> int:
    number = int(value)
    if number < 257:
        raise argparse.ArgumentTypeError(f"got {value}, expected 257 or more: one for each byte")
    return number


def _megabytes(value: str) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {value}, expected more than 0")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    options.restarted = _is_restarted(options)
    if options.restarted:
        options.resume = ""
    try:
        if options.sample is not None:
            continue_prompt(options)
        else:
            train(options)
    except ds_core.DsError as error:
        if _is_mine_to_say(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        comm.shutdown()
    return 0


def _is_restarted(options: argparse.Namespace) -> bool:
    """Whether `ds run --max-restarts` has started the run in --out again, which then goes on."""
    num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    is_started = options.out is not None and (Path(options.out) / run_folder.SETTINGS).exists()
    return num_restarts > 0 and is_started and options.resume is None and options.sample is None


def _is_mine_to_say(error: ds_core.DsError) -> bool:
    """What stops all ranks alike is said by rank 0; what befalls one rank, by that one."""
    stops_all = isinstance(error, ExampleError | ConfigError | CheckpointError)
    return not (stops_all and comm.is_initialized() and comm.Mesh.world().group("dp").rank)


if __name__ == "__main__":
    sys.exit(main())
