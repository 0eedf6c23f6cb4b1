"""Writes down what DeepSpeed's public functions are called with, for the tests of our `deepspeed`.

    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu python scripts/original_signatures.py \
        packages/deepspeed/tests/data/original_signatures.json

Needs the original deepspeed (0.19.8 made what is there), not the package of this repository. What
is written are facts about its interface alone: names of parameters, whether they can be passed by
position, and defaults.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Single functions and classes (their constructors), by module.
CALLABLES = {
    "deepspeed": "initialize init_inference init_distributed add_config_arguments tp_model_init "
    "OnDevice DeepSpeedEngine DeepSpeedConfig log_dist",
    "deepspeed.zero": "Init GatheredParameters TiledLinear TiledLinearReturnBias "
    "register_external_parameter unwrap_model_for_generation",
    "deepspeed.runtime.zero.partition_parameters": "shutdown_init_context restore_init_context "
    "zero_wrapper_for_fp_tensor_constructor is_zero_param unregister_external_parameter",
    "deepspeed.runtime.dataloader": "DeepSpeedDataLoader RepeatingLoader",
    "deepspeed.runtime.lr_schedules": "LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR "
    "add_tuning_arguments parse_arguments override_params get_config_from_args "
    "get_lr_from_config",
    "deepspeed.ops.adam": "DeepSpeedCPUAdam FusedAdam",
    "deepspeed.ops.adagrad": "DeepSpeedCPUAdagrad",
    "deepspeed.ops.deepspeed4science": "DS4Sci_EvoformerAttention",
    "deepspeed.ops.lamb": "FusedLamb",
    "deepspeed.ops.lion": "DeepSpeedCPULion FusedLion",
    "deepspeed.ops.transformer": "DeepSpeedTransformerConfig DeepSpeedTransformerLayer",
    "deepspeed.ops.transformer.inference.bias_add": "nhwc_bias_add",
    "deepspeed.monitor.monitor": "MonitorMaster",
    "deepspeed.profiling.flops_profiler": "FlopsProfiler get_model_profile",
    "deepspeed.checkpoint.utils": "clone_tensors_for_torch_save get_model_ckpt_name_for_rank "
    "get_zero_ckpt_name_for_rank get_layer_ckpt_name_for_rank",
}
#: Modules of which every public function is written down.
MODULES = (
    "deepspeed.comm.comm",
    "deepspeed.runtime.activation_checkpointing.checkpointing",
    "deepspeed.utils.groups",
    "deepspeed.utils.logging",
    "deepspeed.utils.tensor_fragment",
    "deepspeed.utils.z3_leaf_module",
    "deepspeed.utils.zero_to_fp32",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
)
#: Classes of which every public method and property is written down.
CLASSES = (
    "deepspeed.runtime.engine.DeepSpeedEngine",
    "deepspeed.accelerator.abstract_accelerator.DeepSpeedAccelerator",
    "deepspeed.runtime.lr_schedules.WarmupLR",
    "deepspeed.runtime.lr_schedules.OneCycle",
    "deepspeed.runtime.lr_schedules.LRRangeTest",
)


def parameters(function: Callable[..., Any]) -> list[list[str]] | None:
    """[name, kind, default as text] of each parameter; without a default, two of them."""
    try:
        signature = inspect.signature(undecorated(function))
    except (TypeError, ValueError):
        return None
    return [
        [p.name, p.kind.name, *([] if p.default is p.empty else [default_text(p.default)])]
        for p in signature.parameters.values()
    ]


def undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a decorator, which takes anything, hands its arguments on to."""
    while inspect.isfunction(function):
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        inner = [
            cell.cell_contents
            for cell in function.__closure__ or ()
            if inspect.isfunction(cell.cell_contents)
        ]
        takes_anything = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        if not takes_anything or len(inner) != 1:
            break
        function = inner[0]
    return function


def default_text(value: Any) -> str:
    """A default as text that is the same in every process."""
    if isinstance(value, type) or inspect.isroutine(value):
        return f"<{value.__name__}>"
    text = repr(value)
    return f"<{type(value).__name__}>" if " at 0x" in text else text


def home_of(path: str) -> Any:
    """A module by its path, or what its parent calls so."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        parent, _, name = path.rpartition(".")
        return getattr(importlib.import_module(parent), name)


def of_modules() -> dict[str, Any]:
    """The signature of each function, by its full name."""
    found = {}
    for module, names in CALLABLES.items():
        home = home_of(module)
        for name in names.split():
            if not hasattr(home, name):
                raise SystemExit(f"{module} has no {name}")
            found[f"{module}.{name}"] = parameters(getattr(home, name))
    for module in MODULES:
        home = home_of(module)
        for name, value in vars(home).items():
            is_own = inspect.isfunction(value) and value.__module__ == module
            if is_own and (not name.startswith("_") or module.endswith("groups")):
                found[f"{module}.{name}"] = parameters(value)
    return found


def of_classes() -> dict[str, Any]:
    """The signature of each public method; None of a property."""
    found: dict[str, Any] = {}
    for path in CLASSES:
        module, _, name = path.rpartition(".")
        own: dict[str, Any] = {}
        for base in reversed(getattr(importlib.import_module(module), name).__mro__):
            if base.__module__.startswith("deepspeed"):
                own |= vars(base)
        found[path] = {
            key: None if isinstance(value, property) else parameters(value)
            for key, value in own.items()
            if not key.startswith("_") and (callable(value) or isinstance(value, property))
        }
    return found


def main() -> None:
    """Write the file that the command line names."""
    import deepspeed

    if getattr(deepspeed, "__provider__", None) is not None:
        raise SystemExit("this is the package of this repository; it is the original that is asked")
    told = {
        "version": deepspeed.__version__,
        "functions": dict(sorted(of_modules().items())),
        "methods": of_classes(),
    }
    Path(sys.argv[1]).write_text(as_text(told) + "\n", encoding="utf-8")


def as_text(value: Any, depth: int = 0) -> str:
    """JSON with a line for each function."""
    if not isinstance(value, dict):
        return json.dumps(value)
    pad = " " * (depth + 1)
    rows = [f"{pad}{json.dumps(key)}: {as_text(item, depth + 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(rows) + "\n" + " " * depth + "}"


if __name__ == "__main__":
    main()
