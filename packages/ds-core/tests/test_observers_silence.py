"""Nothing is printed unless somebody asks, and then with the rank that it is from."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

import ds_core
from ds_core import comm, logs
from ds_core.testing import run_ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
}


def run_with_output_in_files(folder, **changes):
    """A whole training; what this rank's process wrote, Python or C++, to either stream."""
    files = [open(f"{folder}/{name}{dist.get_rank()}", "w+") for name in ("out", "err")]  # noqa: SIM115
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    streams = sys.stdout, sys.stderr
    try:
        for number, file in enumerate(files, start=1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = files
        train(folder, **changes)
    finally:
        sys.stdout, sys.stderr = streams
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        for file in files:
            file.close()
    return [open(file.name).read() for file in files]


def train(folder, **changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    data = [(torch.ones(3), torch.ones(1))] * 32
    engine = ds_core.initialize(model, {**CONFIG, **changes}, training_data=data)
    for x, y in engine.dataloader:
        engine.backward((engine(x) - y).square().mean())
        engine.step()
    logging.getLogger("ds_core.test").warning("told at step %d", engine.global_step)
    engine.save_checkpoint(f"{folder}/checkpoints")
    engine.load_checkpoint(f"{folder}/checkpoints")
    engine.close()


def test_a_training_with_default_settings_prints_nothing(tmp_path):
    assert run_ranks(2, run_with_output_in_files, str(tmp_path)) == [["", ""], ["", ""]]


def test_progress_is_rank_0_s_alone(tmp_path):
    (out, err), other = run_ranks(2, run_with_progress, str(tmp_path))
    assert out == ""
    assert err.startswith("ranks ")
    assert "step 2  loss" in err
    assert other == ["", ""]


def run_with_progress(folder):
    return run_with_output_in_files(folder, progress=True, steps_per_print=1)


@contextmanager
def a_program_without_logging():
    """No handlers at the root, where pytest puts its own; `ds_core`'s logger restored after."""
    logger, root = logging.getLogger("ds_core"), logging.getLogger()
    before, level, handlers = list(logger.handlers), logger.level, list(root.handlers)
    root.handlers.clear()
    try:
        yield
    finally:
        logger.handlers[:], root.handlers[:] = before, handlers
        logger.setLevel(level)


def test_a_log_level_shows_messages_with_their_rank(capsys):
    with a_program_without_logging():
        logs.show("info", ["ds_core"], rank=3)
        logs.show("info", ["ds_core"], rank=3)
        logging.getLogger("ds_core.test").info("decided")
        logging.getLogger("ds_core.test").debug("detail")
    assert capsys.readouterr().err == "[rank 3] INFO ds_core.test: decided\n"


def test_handlers_of_the_program_itself_are_used_where_there_are_some(capsys):
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    with a_program_without_logging():
        logging.getLogger().addHandler(handler)
        logs.show("info", ["ds_core"], rank=0)
        logging.getLogger("ds_core.test").info("decided")
    assert seen == ["decided"]
    assert capsys.readouterr().err == ""


def test_the_config_s_log_level_reaches_the_loggers(capsys):
    with a_program_without_logging():
        ds_core.initialize(nn.Linear(3, 1), {**CONFIG, "log_level": "debug"}).close()
        comm.shutdown()
        logging.getLogger("ds_core.test").debug("detail")
    assert "[rank 0] DEBUG ds_core.test: detail\n" in capsys.readouterr().err
