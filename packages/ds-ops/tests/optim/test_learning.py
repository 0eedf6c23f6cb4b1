"""Adam8bit learns real text as Adam does."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_ops

_GPT = Path(__file__).parents[4] / "examples" / "gpt" / "model.py"
_STEPS, _BATCH, _TOKENS = 120, 16, 64


def final_loss(make: Callable[..., Any]) -> float:
    """Mean of the last 20 losses of a small GPT on the bytes of Python's own source."""
    spec = importlib.util.spec_from_file_location("gpt_model", _GPT)
    assert spec is not None
    assert spec.loader is not None
    gpt = importlib.util.module_from_spec(spec)
    sys.modules["gpt_model"] = gpt  # dataclasses look their module up
    spec.loader.exec_module(gpt)
    source = "".join(Path(str(module.__file__)).read_text() for module in (inspect, typing))
    text = torch.tensor(list(source.encode()))
    torch.manual_seed(0)
    model = gpt.GPT(gpt.SIZES["tiny"], 256, _TOKENS)
    optimizer = make(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        starts = torch.randint(len(text) - _TOKENS - 1, (_BATCH,), generator=generator)
        rows = torch.stack([text[start : start + _TOKENS + 1] for start in starts.tolist()])
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@pytest.mark.skipif(not _GPT.exists(), reason="the examples are not beside this package")
def test_eight_bit_states_reach_the_loss_of_fp32_states():
    adam, eight_bit = final_loss(ds_ops.FusedAdam), final_loss(ds_ops.Adam8bit)
    assert adam < 3.0  # it learned: 256 equally likely bytes would be 5.5
    assert abs(eight_bit - adam) <= 0.01 * adam
