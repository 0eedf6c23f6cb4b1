"""The model of a plan: from a number of parameters, a config.json, or a function that builds it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_core import _values
from ds_core.errors import PlanError
from ds_core.planning.hf_config import read_hf_config
from ds_core.planning.transformer import TransformerShape, guess_shape
from ds_core.precision import Precision

_MOST_PARAMETERS = 10**15
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Measured:
    """What one forward of a model did, without computing anything.

    Attributes:
        samples: of the batch it ran on.
        activation_bytes: saved for backward.
        flops: of forward and backward.
    """

    samples: int
    activation_bytes: int
    flops: float


@dataclass(frozen=True)
class ModelSource:
    """A model to plan for.

    Attributes:
        description: what it is, for the report.
        module: its parameters, without data.
        shape: its sizes, if it is a transformer that is described by them.
        measured: what a forward of it does, if it came with a batch.
        notes: what is assumed about it.
    """

    description: str
    module: nn.Module
    shape: TransformerShape | None = None
    measured: Measured | None = None
    notes: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of all its parameters."""
        return sum(param.numel() for param in self.module.parameters())


def model_of_size(text: str) -> ModelSource:
    """A decoder of so many parameters, such as "7e9", "350M" or "7b"; its sizes are guessed.

    Raises PlanError if that is no number.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kmbgt]?)", text.strip().lower().replace("_", ""))
    try:
        numel = round(float(match[1]) * _SCALES[match[2]]) if match else 0
    except (ValueError, OverflowError):
        numel = 0
    if not 1 <= numel <= _MOST_PARAMETERS:
        raise PlanError(
            f"--params: got {text!r}, expected a number such as 7e9, 350M or 7B (at most 1e15)"
        )
    shape = guess_shape(numel)
    note = (
        f"only the number of parameters is known: taken for {shape.layers} equal layers of width "
        f"{shape.hidden} with a vocabulary of {shape.vocab}; give --model for exact figures"
    )
    return ModelSource(
        f"{numel:,} parameters", _even_layers(numel, shape.layers), shape, None, (note,)
    )


def model_from(text: str, micro_batch: int = 1, precision: Precision | None = None) -> ModelSource:
    """The model that `--model` names.

    Args:
        text: a Hugging Face config.json (or its folder), FILE.py:FUNCTION or MODULE:FUNCTION.
        micro_batch: handed to a function that takes a `micro_batch_size`.
        precision: number formats that the model is going to compute in.

    Raises PlanError if there is no such thing, or it does not build a model.
    """
    path = Path(text)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        shape = read_hf_config(path)
        return ModelSource(f"{path}", shape.build(), shape)
    return _from_function(text, load_function(text), micro_batch, precision or Precision())


def load_function(text: str) -> Callable[..., Any]:
    """The function that FILE.py:FUNCTION or MODULE:FUNCTION names.

    Raises PlanError if there is none.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise PlanError(
            f"got {text!r}, expected a Hugging Face config.json, FILE.py:FUNCTION or "
            f"MODULE:FUNCTION, where the function returns the model, or the model and a batch"
        )
    module = _import(place)
    found = getattr(module, name, None)
    if not callable(found):
        callables = [key for key, value in vars(module).items() if callable(value)]
        hint = _values.nearest(name, callables)
        guess = f"; did you mean {hint}?" if hint else ""
        raise PlanError(f"{text}: {place} has no function {name!r}{guess}")
    function: Callable[..., Any] = found
    return function


def call_function(function: Callable[..., Any], micro_batch: int) -> tuple[Any, Any]:
    """The model and the batch (None if there is none) that a user's function returns."""
    takes_size = "micro_batch_size" in inspect.signature(function).parameters
    made = function(micro_batch_size=micro_batch) if takes_size else function()
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"{function.__name__}: returned {type(model).__name__}, expected a torch.nn.Module, or "
            f"a pair of one and a batch"
        )
    return model, batch


def _import(place: str) -> Any:
    if not place.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(place)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise PlanError(f"{place}: cannot be imported: {told}") from error
        finally:
            sys.path.pop(0)
    path = Path(place)
    if not path.is_file():
        raise PlanError(f"{place}: no such file in {Path.cwd()}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise PlanError(f"{place}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Its neighbours are importable, as they are when it is run as a script.
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PlanError(f"{place}: fails when imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _from_function(
    text: str, function: Callable[..., Any], micro_batch: int, precision: Precision
) -> ModelSource:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        try:
            model, batch = call_function(function, micro_batch)
            measured = None
            if batch is not None:
                measured = measure(model, batch, precision)
                model, _ = call_function(function, micro_batch)  # that one may have been cast
        except PlanError:
            raise
        except Exception as error:
            raise PlanError(
                f"{text}: fails on tensors without data: {type(error).__name__}: {error}; build "
                f"the model with random weights and the batch with torch.zeros or torch.randint"
            ) from error
    notes: tuple[str, ...] = ()
    if measured is None:
        notes = (
            "activations and attention are not counted: let the function return (model, batch) for "
            "them to be",
        )
    return ModelSource(text, model, None, measured, notes)


def measure(model: nn.Module, batch: Any, precision: Precision | None = None) -> Measured:
    """What a forward of `model` on `batch` saves and computes; the tensors may be fake.

    The model is cast to the dtype of `precision`, floating-point inputs too. Backward counts as
    twice the operations of forward. What `torch.utils.checkpoint` recomputes is counted once, and
    not as saved.
    """
    from torch.utils.flop_counter import FlopCounterMode

    precision = precision or Precision()
    if precision.compute is not None:
        _cast_parameters(model, precision.compute)
        batch = _cast(batch, precision.compute)
    device = next(model.parameters()).device.type
    autocast = torch.autocast(
        device, precision.autocast or torch.bfloat16, enabled=precision.autocast is not None
    )
    weights = {_storage(param) for param in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in weights:
            saved[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={cpu_attention: _attention_flops})
    with autocast, counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = _call(model, batch)
    del output
    size = sum(storage.nbytes() for storage in saved.values())
    return Measured(_num_samples(batch), size, 3.0 * counter.get_total_flops())


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """As `model.to(dtype)`, which does not work on fake tensors."""
    cast: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None or not param.is_floating_point():
                continue
            if id(param) not in cast:
                cast[id(param)] = nn.Parameter(param.detach().to(dtype), param.requires_grad)
            module._parameters[name] = cast[id(param)]


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of a fused attention, from shapes `[b, a, s, k]`; torch has none for the CPU's."""
    from torch.utils.flop_counter import sdpa_flop_count

    return int(sdpa_flop_count(query, key, value))


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_cast(value, dtype) for value in batch)
    return batch


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _num_samples(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch
    tensors = [batch] if isinstance(batch, torch.Tensor) else values
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.dim():
            return tensor.shape[0]
    raise PlanError("the batch holds no tensor with a first dimension, that of its samples")


def _even_layers(numel: int, layers: int) -> nn.Module:
    """A stack of equal layers, each one tensor, that has exactly `numel` parameters."""
    model = nn.Module()
    share, rest = divmod(numel, layers)

    def layer() -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(share, device="meta"))
        return module

    model.layers = nn.ModuleList(layer() for _ in range(layers if share else 0))
    if rest:
        model.rest = nn.Parameter(torch.empty(rest, device="meta"))
    return model
