"""What the pool tells a worker to run, and how a worker finds the function that is meant."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import io
import itertools
import os
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

from ds_core.errors import DsError


class TaskError(DsError, ValueError):
    """A function or its arguments cannot be sent to a worker process."""


@dataclass(frozen=True)
class FunctionRef:
    """A module-level function, named so that a process that never saw its module can load it.

    `is_test_file` says that pytest loaded the module, with asserts that show what they compare.
    """

    module: str
    file: str
    qualname: str
    is_test_file: bool


@dataclass(frozen=True)
class Task:
    """One rank's share of one run. `arguments` is the pickled `(args, kwargs)`.

    The ranks meet in `store_file` if the worker is to initialise torch.distributed, else (when
    the function does so itself) at `master_port`.
    """

    rank: int
    world_size: int
    store_file: str
    master_port: int
    timeout_s: float
    initialized: bool
    function: FunctionRef
    arguments: bytes
    environ: dict[str, str]
    sys_path: list[str]
    cwd: str


def reference(fn: Callable[..., Any]) -> FunctionRef:
    """How a worker can find `fn`. Raises TaskError unless it is a function at module level."""
    if not isinstance(fn, types.FunctionType) or "<" in fn.__qualname__:
        name = getattr(fn, "__qualname__", repr(fn))
        raise TaskError(
            f"run_ranks: got {name}, which a worker process cannot load by name; pass a function "
            "defined at the top level of a module (no lambda, closure, bound method or partial) "
            "and give it what it needs as arguments"
        )
    file = inspect.getsourcefile(fn)
    if file is None or not os.path.isfile(file):
        raise TaskError(
            f"run_ranks: {fn.__qualname__} has no source file ({file}); "
            "worker processes load functions from files"
        )
    spec = getattr(sys.modules.get(fn.__module__), "__spec__", None)
    is_test_file = type(getattr(spec, "loader", None)).__name__ == "AssertionRewritingHook"
    return FunctionRef(fn.__module__, os.path.abspath(file), fn.__qualname__, is_test_file)


def resolve(ref: FunctionRef) -> Any:
    """The function that `ref` names, loading its module on first use."""
    found: Any = _module(ref)
    for part in ref.qualname.split("."):
        found = getattr(found, part)
    return found


def dumps(value: object) -> bytes:
    """`value` pickled, with tensors by value; a view costs its own bytes, not its storage's."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not torch.Tensor or obj.layout is not torch.strided or obj.is_meta:
            return NotImplemented
        if obj.untyped_storage().nbytes() == obj.nbytes:
            return NotImplemented
        return obj.detach().clone().requires_grad_(obj.requires_grad).__reduce_ex__(2)


def _module(ref: FunctionRef) -> types.ModuleType:
    # A script's `__main__` must not run again as the main program.
    name = "__ranks_main__" if ref.module == "__main__" else ref.module
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == ref.file:
        return loaded
    if not ref.is_test_file and _is_importable_as(name, ref.file):
        return importlib.import_module(name)
    return _load_file(name, ref)


def _is_importable_as(name: str, file: str) -> bool:
    """Whether `import name` would execute `file` (it may have been loaded by path)."""
    spec = _find_spec(name)
    return spec is not None and spec.origin is not None and os.path.abspath(spec.origin) == file


def _find_spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None


def _load_file(name: str, ref: FunctionRef) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ref.file)
    if spec is None:
        raise TaskError(f"run_ranks: {ref.file} is not a Python file that a worker can load")
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs, under the parent's name, so that pickles of its classes resolve;
    # so are its packages, which unpickling imports, if nothing on sys.path provides them.
    sys.modules[name] = module
    for package in itertools.accumulate(name.split(".")[:-1], "{}.{}".format):
        if package not in sys.modules and _find_spec(package) is None:
            sys.modules[package] = types.ModuleType(package)
    try:
        exec(_compiled(ref), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _compiled(ref: FunctionRef) -> types.CodeType:
    source = Path(ref.file).read_bytes()
    tree = ast.parse(source, filename=ref.file)
    if ref.is_test_file:
        from _pytest.assertion.rewrite import rewrite_asserts

        rewrite_asserts(tree, source, ref.file)
    return compile(tree, ref.file, "exec", dont_inherit=True)
