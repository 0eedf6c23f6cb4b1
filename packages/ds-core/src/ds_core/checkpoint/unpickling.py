"""Reading what others pickled: tensors and plain values, and never code.

A pickle names functions that its reader is to call. Here only names on a list are known, and most
of them stand for objects of ours that hold what they are given and do nothing.
"""

from __future__ import annotations

import importlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch

from ds_core.errors import CheckpointError


class Record:
    """Stands for an object of somebody's class: what it was given, and no behaviour.

    Attributes:
        arguments: what it was made with.
    """

    arguments: tuple[Any, ...] = ()

    def __new__(cls, *arguments: Any, **_: Any) -> Record:
        record = super().__new__(cls)
        record.arguments = arguments
        return record

    def __init__(self, *arguments: Any, **values: Any) -> None:
        self.__dict__.update(values)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def get(self, name: str, default: Any = None) -> Any:
        """One attribute of the object that was pickled."""
        return self.__dict__.get(name, default)


class Dropped(Record):
    """Stands for an object that was not asked for."""


def load_torch_file(
    file: str | Path | BinaryIO,
    *,
    allow: Mapping[str, Any] | None = None,
    drop_objects: bool = False,
    what: str | None = None,
) -> Any:
    """What `torch.save` wrote: tensors, and plain values around them. Runs nothing from the file.

    Tensors of a file on disk are mapped into memory, not read, until they are used.

    Args:
        file: its path, or a buffer that is it from its beginning.
        allow: what else may be in it: names such as "package.module.Class" and what stands for
            each, a `Record` or a plain type.
        drop_objects: whether other objects become `Dropped` ones rather than an error.
        what: how errors name the file. Default: its path.

    Raises:
        CheckpointError: if the file asks for any name that is not allowed (lists them), or is
            damaged.
    """
    what = what or str(file)
    known = dict(allow or {})
    if drop_objects:
        for name in _names_in(file, what):
            known.setdefault(name, type(name.rpartition(".")[2], (Dropped,), {}))
    mapped = isinstance(file, str | Path) and zipfile.is_zipfile(file)
    try:
        with (
            torch.serialization.safe_globals([(stand_in, n) for n, stand_in in known.items()]),
            warnings.catch_warnings(),
        ):
            # Of pickles that torch did not write; what it cannot read is an error all the same.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        refused = re.findall(r"GLOBAL ([\w.]+)", str(error)) or re.findall(
            r"`([\w.]+)`", str(error)
        )
        names = sorted({*(set(_names_in(file, what)) - known.keys()), *refused[:1]})
        raise refusal(what, names) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{what} cannot be read, it is damaged: {reason}") from error


def refusal(what: str, names: list[str]) -> CheckpointError:
    """The error for a file that asks for names that are not allowed."""
    told = f": it asks for {', '.join(names[:6])}" if names else ""
    return CheckpointError(
        f"{what}: refused to unpickle{told}. A pickle can make its reader run any code, so only "
        "tensors and plain values are read. If you trust nothing in the file but its tensors, "
        "leave the other objects out with --drop-objects"
    )


def _names_in(file: str | Path | BinaryIO, what: str) -> list[str]:
    """The names that a file asks for and that torch does not know as harmless."""
    if not isinstance(file, str | Path):
        file.seek(0)
    try:
        if not zipfile.is_zipfile(file):
            return []
        if not isinstance(file, str | Path):
            file.seek(0)
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except (RuntimeError, pickle.UnpicklingError, ValueError, OSError) as error:
        raise CheckpointError(f"{what} cannot be read, it is damaged: {error}") from error
    finally:
        if not isinstance(file, str | Path):
            file.seek(0)


_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that torch's distributed checkpoint describes tensors with."""

    def __init__(self, file: BinaryIO, what: str) -> None:
        super().__init__(file)
        self._what = what

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePosixPath
        raise refusal(self._what, [f"{module}.{name}"])


def load_dcp_metadata(path: Path) -> Any:
    """The `Metadata` in the `.metadata` file of a torch distributed checkpoint.

    Raises:
        CheckpointError: if the file asks for anything but what describes tensors, or is damaged.
    """
    try:
        return _MetadataUnpickler(io.BytesIO(path.read_bytes()), str(path)).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail anywhere
        raise CheckpointError(f"{path} cannot be read, it is damaged: {error!r}") from error
