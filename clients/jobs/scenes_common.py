"""What the scenes of accelerate share: an Accelerator, a model, data, and the plain arithmetic."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WORDS, LENGTH, BATCH, RANKS = 16, 6, 4, 2
Ids = torch.Tensor


class Words(nn.Module):
    """Says which word comes next; its inputs are integers, so they fit every precision."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, WORDS)

    def forward(self, ids: Ids) -> torch.Tensor:
        return self.head(torch.tanh(self.middle(self.embed(ids))))


def loss_of(model: Callable[[Ids], torch.Tensor], ids: Ids) -> torch.Tensor:
    """Cross entropy of the next word, which is the present one plus one."""
    said = model(ids).float()
    return nn.functional.cross_entropy(said.flatten(0, 1), (ids.flatten() + 1) % WORDS)


def rows(count: int = 96) -> Ids:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(WORDS, (count, LENGTH), generator=generator)


def loader(count: int = 96) -> DataLoader:
    """Batches of `BATCH` rows; accelerate deals them out, batch k to rank k % RANKS."""
    return DataLoader(TensorDataset(rows(count)), batch_size=BATCH)


def dealt(steps: int, count: int = 96) -> list[list[Ids]]:
    """The batches of all ranks, for each of the first micro-batches."""
    batches = rows(count).split(BATCH)
    return [list(batches[i * RANKS : (i + 1) * RANKS]) for i in range(steps)]


def fresh(seed: int = 5, width: int = 8) -> Words:
    set_seed(seed)
    return Words(width)


def accelerator_of(plugin: Any = None, **options: Any) -> Accelerator:
    """A new Accelerator that knows of no former one."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    handlers = [InitProcessGroupKwargs(backend="gloo")]
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=handlers, **options)


def plugin_of(stage: int, **config: Any) -> DeepSpeedPlugin:
    """A plugin with a configuration of its own: keys beside stage and sizes."""
    whole = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage, **config.pop("zero", {})},
    }
    return DeepSpeedPlugin(hf_ds_config={**whole, **config})


def trained(
    accelerator: Accelerator, model: Any, optimizer: Any, batches: Sequence[Any], **options: Any
) -> list[float]:
    """The loop of a user; the mean loss over ranks of each micro-batch."""
    losses = []
    for (ids,) in batches:
        with accelerator.accumulate(model):
            loss = loss_of(model, ids)
            accelerator.backward(loss, **options)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses


def first(loader: Any, steps: int) -> list[Any]:
    """The first batches of a prepared loader, which is read to its end."""
    return list(loader)[:steps]


def by_hand(
    model: nn.Module,
    batches: Sequence[Sequence[Ids]],
    make: Callable[[Any], torch.optim.Optimizer],
    *,
    accumulate: int = 1,
    boundaries: Sequence[int] | None = None,
    clip: float | None = None,
) -> list[float]:
    """The same losses by plain torch in fp64, on a copy of the model and all ranks' batches."""
    model = copy.deepcopy(model).double()
    optimizer = make(model.parameters())
    ends = boundaries or range(accumulate - 1, len(batches), accumulate)
    losses = []
    for index, of_ranks in enumerate(batches):
        logits = [model(ids).flatten(0, 1) for ids in of_ranks]
        targets = [(ids.flatten() + 1) % WORDS for ids in of_ranks]
        each = [nn.functional.cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]
        loss = torch.stack(each).mean()
        (loss / accumulate).backward()
        losses.append(loss.item())
        if index in ends:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def message_of(action: Callable[[], Any]) -> str:
    """The kind and text of the error that something ends with; "" if it ends with none."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
