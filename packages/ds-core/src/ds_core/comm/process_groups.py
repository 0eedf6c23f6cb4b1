"""What torch knows of a process group."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


def backend_of(pg: dist.ProcessGroup) -> str:
    """The name of a group's backend; of several, that of the accelerator."""
    name = str(dist.get_backend(pg)).lower()
    return name if ":" not in name else name.split(":")[-1]


def timeout_of(pg: dist.ProcessGroup) -> timedelta | None:
    """The timeout of a group's backend; None where it does not tell."""
    device = pg._device_types[0] if pg._device_types else torch.device("cpu")
    options = getattr(pg._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else None
