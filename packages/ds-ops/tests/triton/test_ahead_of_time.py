"""Every kernel in Triton, with every config, compiled for every target, without a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from ds_ops.native import cache
from ds_ops.triton_kernels import compiling
from ds_ops.triton_kernels.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", [kernel.name for kernel in compiling.kernels()])
def test_it_compiles_and_fits(kernel, target):
    found = [
        compiling.compiled(*cell, cache.root())
        for cell in compiling.cells(target)
        if cell[0].name == kernel
    ]
    assert found, f"{kernel} has no config for {target}"
    wrong = [str(each) for each in found if each.problem]
    assert not wrong, "\n".join(wrong)
