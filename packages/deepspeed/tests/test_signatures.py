"""Every parameter of the original's functions is taken, under its name, in its place, by default.

`data/original_signatures.json` was written by scripts/original_signatures.py from DeepSpeed itself.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import deepspeed
from deepspeed._stand_in import is_stand_in
from deepspeed.runtime.engine import _INSTEAD

ORIGINAL = json.loads(
    (Path(__file__).parent / "data" / "original_signatures.json").read_text(encoding="utf-8")
)
METHODS = {
    f"{owner}.{name}": given
    for owner, methods in ORIGINAL["methods"].items()
    for name, given in methods.items()
}
ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine."

#: Functions of the original's modules that only it calls: they are not there under our names.
INNER = {
    f"{module}.{name}"
    for module, names in {
        "deepspeed.runtime.zero.stage3": "input isclose lcm model_to_params move_to_cpu "
        "print_rank_0",
        "deepspeed.runtime.zero.stage_1_and_2": "get_alignment_padding input isclose lcm "
        "model_to_params print_rank_msg split_half_float_double",
        "deepspeed.utils.groups": "_ensure_divisibility _release_process_group_references",
        "deepspeed.utils.tensor_fragment": "get_full_hp_grad get_full_hp_param "
        "get_hp_fragment_mapping map_to_flat_opt_states set_full_hp_grad set_full_hp_param",
        "deepspeed.utils.z3_leaf_module": "apply_zero_leaf_module_config",
        "deepspeed.utils.zero_to_fp32": "atoi natural_keys parse_model_states "
        "parse_optim_states to_torch_tensor zero3_partitioned_param_info",
    }.items()
    for name in names.split()
}
#: Defaults that are written otherwise and mean the same, by name of the parameter.
SAME = {
    "timeout": "None: DEEPSPEED_TIMEOUT minutes, else ten",
    "log_name": "under which name a call is counted",
    "debug": "not used",
    "device": "cpu, as a name",
    "op": "sum, of torch's enumeration of either name",
    "linear_cls": "torch.nn.Linear",
    "tensor_overrides": "both, as a tuple",
}


def found_at(path: str) -> Any:
    """The object of a dotted name, modules imported as needed; None if there is none."""
    module, *rest = path.split(".")
    found: Any = importlib.import_module(module)
    for part in rest:
        module = f"{module}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError:
                return None
    return found


def differences(original: list[list[str]], ours: Any) -> list[str]:
    """In words, where a call that the original takes is not taken in the same sense."""
    taken = list(inspect.signature(ours).parameters.values())
    by_name = {p.name: p for p in taken}
    told = []
    for place, (name, kind, *default) in enumerate(original):
        if kind in ("VAR_KEYWORD", "VAR_POSITIONAL"):
            if not any(p.kind.name == kind for p in taken):
                told.append(f"no {kind}")
        elif name not in by_name:
            told.append(f"no {name}")
        else:
            told += _of_one(name, kind, default, by_name[name], taken.index(by_name[name]) == place)
    names = {name for name, *_ in original}
    return told + [
        f"{p.name} has to be given"
        for p in taken
        if p.name not in names and p.default is p.empty and not p.kind.name.startswith("VAR_")
    ]


def _of_one(
    name: str, kind: str, default: list[str], ours: inspect.Parameter, is_in_place: bool
) -> list[str]:
    told = []
    if kind == "POSITIONAL_OR_KEYWORD" and (ours.kind is ours.KEYWORD_ONLY or not is_in_place):
        told.append(f"{name} is in another place")
    if default and ours.default is ours.empty:
        told.append(f"{name} has no default")
    elif default and name not in SAME and not _means(ours.default, default[0]):
        told.append(f"the default of {name} is {ours.default!r}, not {default[0]}")
    return told


def _means(ours: Any, original: str) -> bool:
    if repr(ours) == original:
        return True
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(original)
        # Nothing, in a form that no call can change for the next one.
        return bool(ours == value) or (value in ([], {}) and not ours)
    return False


@pytest.mark.parametrize("path", sorted(ORIGINAL["functions"]))
def test_a_function_takes_what_the_originals_takes(path: str):
    ours = found_at(path)
    if path in INNER:
        assert ours is None or is_stand_in(ours)
    elif not is_stand_in(ours):
        assert ours is not None
        assert differences(ORIGINAL["functions"][path], ours) == []


@pytest.mark.parametrize("path", sorted(METHODS))
def test_a_method_takes_what_the_originals_takes(path: str):
    original, ours = METHODS[path], found_at(path)
    if ours is None:
        assert path.startswith(ENGINE)
        assert path.removeprefix(ENGINE) in _INSTEAD, "what is not there says what to use"
    elif original is None:
        assert isinstance(ours, property)
    else:
        assert differences(original, ours) == []


def test_the_table_is_of_the_version_that_ours_says():
    assert deepspeed.__version__.startswith(f"{ORIGINAL['version']}+")


def test_a_difference_is_told():
    def ours(b: int, a: int, *, c: int = 1, d: int) -> None:
        """In another order, with another default, and more to give."""

    original = [["a", "POSITIONAL_OR_KEYWORD"], ["b", "POSITIONAL_OR_KEYWORD", "3"]]
    original += [["c", "KEYWORD_ONLY", "2"], ["kwargs", "VAR_KEYWORD"], ["e", "KEYWORD_ONLY", "2"]]
    assert differences(original, ours) == [
        "a is in another place",
        "b is in another place",
        "b has no default",
        "the default of c is 1, not 2",
        "no VAR_KEYWORD",
        "no e",
        "d has to be given",
    ]
