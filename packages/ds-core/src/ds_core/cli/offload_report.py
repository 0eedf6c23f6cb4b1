"""What of a report concerns offload: who would step on the host, and who moves tensors to disk."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass

import torch
from torch import nn

from ds_core import optimizers, plugins
from ds_core.errors import DsError
from ds_core.tensor_files import open_tensor_files

#: What users offload, as configs name it.
_TYPES = ("AdamW", "Lion", "Adagrad", "Muon")
_NATIVE = "C++"


@dataclass(frozen=True)
class OffloadRow:
    """One choice.

    Attributes:
        what: is chosen for.
        chosen: what would run.
        reason: why.
    """

    what: str
    chosen: str
    reason: str


@dataclass(frozen=True)
class _Choice:
    type: str
    params: dict[str, object]


def offload_rows() -> list[OffloadRow]:
    """The optimizers of the host, and the engine of tensor files, as they would be chosen here."""
    return [*(_optimizer_row(name) for name in _TYPES), _files_row()]


def _optimizer_row(name: str) -> OffloadRow:
    weights = nn.Parameter(torch.zeros(2, 2))
    try:
        built = optimizers.build(_Choice(name, {}), [("weight", weights)], on_host=True)
    except DsError as error:
        return OffloadRow(f"{name} on the host", "none", str(error))
    cls = type(built)
    package = cls.__module__.partition(".")[0]
    if package != "torch":
        home = package.replace("_", "-")
        fused = f"{_NATIVE} kernels, one pass over memory" if home == "ds-ops" else "of ds-core"
        return OffloadRow(f"{name} on the host", f"{home} {cls.__name__}", fused)
    kind = "fused" if built.param_groups[0].get("fused") else "a tensor operation at a time"
    missing = "" if plugins.registered("optimizers") else "; pip install ds-ops for C++ kernels"
    return OffloadRow(f"{name} on the host", f"torch {cls.__name__}", f"{kind}{missing}")


def _files_row() -> OffloadRow:
    """Opens a file beside the other temporary ones, and looks how it is read."""
    what = "tensor files"
    try:
        files = open_tensor_files()
    except (DsError, OSError) as error:
        return OffloadRow(what, "none", str(error))
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = files.open(os.path.join(folder, "probe"))
            why = file.why_buffered
            file.close()
        return OffloadRow(what, files.name, why or f"around the page cache (in {folder!r})")
    except (DsError, OSError) as error:
        return OffloadRow(what, files.name, str(error))
    finally:
        files.close()
