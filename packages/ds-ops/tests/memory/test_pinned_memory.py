"""pinned_empty: locked while the tensor lives, and a clear error when the limit is too small."""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

import ds_ops
from ds_core.errors import OpError


def _locked_kib() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmLck:"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_is_a_tensor_like_any_other(dtype: torch.dtype) -> None:
    t = ds_ops.pinned_empty((3, 5, 7), dtype, accelerator=False)
    assert (t.shape, t.dtype, t.is_contiguous()) == ((3, 5, 7), dtype, True)
    assert t.data_ptr() % mmap.PAGESIZE == 0
    t.fill_(1)
    assert t.sum() == t.numel()


@pytest.mark.parametrize("shape", [0, (0,), (4, 0, 2), (), 1, [2, 2]])
def test_any_shape(shape: int | Sequence[int]) -> None:
    t = ds_ops.pinned_empty(shape, accelerator=False)
    assert t.shape == torch.Size((shape,) if isinstance(shape, int) else shape)


def test_pages_are_locked_for_as_long_as_a_tensor_uses_them() -> None:
    before = _locked_kib()
    t = ds_ops.pinned_empty(1 << 18, accelerator=False)
    assert _locked_kib() - before == 1024
    view = t[1000:].view(-1)
    del t
    gc.collect()
    assert _locked_kib() - before == 1024
    view.zero_()
    del view
    gc.collect()
    assert _locked_kib() == before


def test_default_uses_the_accelerator_if_there_is_one() -> None:
    t = ds_ops.pinned_empty(16)
    assert t.is_pinned() == torch.accelerator.is_available()


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(OpError, match="expected no negative dimension"):
        ds_ops.pinned_empty(-1)
    with pytest.raises(OpError, match=r"cannot map|more than can be addressed"):
        ds_ops.pinned_empty(1 << 61, accelerator=False)


_LIMITED = """
import os, resource, sys, torch, ds_ops
from ds_core.errors import OpError
from ds_ops import pinned_memory
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
if os.getuid() == 0:
    os.setuid(65534)  # root may lock what it likes
held = ds_ops.pinned_empty(4096, torch.uint8, accelerator=False) if limit else None
try:
    ds_ops.pinned_empty(1 << 20, accelerator=False)
except OpError as error:
    print(error)
again = ds_ops.pinned_empty(4096, torch.uint8, accelerator=False) if limit else None
"""


@pytest.mark.parametrize("limit", [65536, 0])
def test_a_limit_that_is_too_small_is_told(limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(limit)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "cannot lock 4096 KiB of memory" in done.stdout
    assert f"limit of this process is {limit // 1024} KiB" in done.stdout
    assert "`ulimit -l 4096`" in done.stdout
    assert f"of which {4 if limit else 0} KiB are used" in done.stdout
