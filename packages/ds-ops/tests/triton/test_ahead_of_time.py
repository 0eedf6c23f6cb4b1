"""Every kernel in Triton, with every config, compiled for every target, without a GPU."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import matrix_kernel
import rounding_kernel

from ds_core.errors import BuildError
from ds_ops.native import cache
from ds_ops.tools import Tools
from ds_ops.triton_kernels import checked, compiling
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


def test_what_is_launched_was_compiled_ahead_of_time():
    """Else Triton compiles anew for a number that is 1, and for one that 16 divides."""
    for kernel in compiling.kernels():
        own = {p.name for p in kernel.function.params if p.do_not_specialize}
        plain = {name for name, kind in kernel.types.items() if kind in ("i32", "i64")}
        if kernel.variant != "uneven" and not kernel.name.startswith("evoformer"):
            assert plain <= own, f"{kernel.name}: {', '.join(sorted(plain - own))}"


@pytest.mark.parametrize("size", ["depth", "columns"])
def test_a_matrix_of_one_row_or_column_compiles(size):
    """Triton makes a constant of a 1, which has not all that a number has."""
    (kernel,) = (each for each in compiling.kernels() if each.name == "grouped_gradient:single")
    one = dataclasses.replace(kernel, types={**kernel.types, size: 1}, variant=f"one of {size}")
    config = one.configs[0]
    assert not compiling.compiled(one, config, TARGETS[config.targets[0]], cache.root()).problem


FAMILIES = ("attention", "evoformer_attention", "sparse_attention", "paged_attention", "kv_cache")


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_change_from_call_to_call_make_no_new_code(family):
    """A decode has a key more at each step: nothing may be compiled for its number."""
    module = importlib.import_module(f"ds_ops.triton_kernels.{family}")
    for kernel in module.KERNELS:
        special = {p.name for p in kernel.function.params if not p.do_not_specialize}
        assert not special & {name for name, kind in kernel.types.items() if kind == "i32"}, kernel


def test_what_does_not_fit_is_said(tmp_path):
    kernel, config, target = next(compiling.cells("gfx942"))
    found = compiling.compiled(kernel, config, target, tmp_path)
    assert not found.problem
    assert f"{found.registers} registers, {found.shared} bytes shared" in str(found)
    for change, told in (
        ({"shared": 65537}, "takes 65537 bytes of shared memory, there are 65536"),
        ({"spilled": 4}, "spills 4"),
        ({"needed": "v_mfma", "matrix": 0}, "has no v_mfma"),
    ):
        assert told in dataclasses.replace(found, **change).problem


def test_what_was_compiled_is_kept(tmp_path, monkeypatch):
    cell = next(compiling.cells("gfx942"))
    first = compiling.compiled(*cell, tmp_path)
    monkeypatch.setattr(compiling.triton, "compile", None)
    assert compiling.compiled(*cell, tmp_path) == first
    with pytest.raises(BuildError, match="does not compile for sm_90"):
        compiling.compiled(cell[0], cell[1], TARGETS["sm_90"], tmp_path)


def test_types_that_do_not_fit_the_function_are_told(tmp_path):
    kernel, config, target = next(compiling.cells())
    wrong = dataclasses.replace(kernel, types={**kernel.types, "other": "i32"})
    with pytest.raises(BuildError, match="do not fit its arguments: other"):
        compiling.compiled(wrong, config, target, tmp_path)


@pytest.mark.parametrize("name", ["gfx942", "GFX90a"])
def test_the_command_compiles_for_a_gpu(name, monkeypatch):
    few = [kernel for kernel in compiling.kernels() if kernel.name.startswith("gated_")]
    monkeypatch.setattr(compiling, "kernels", lambda: few)  # all of them take minutes
    (line,) = Tools().build([name], everything=False, into_package=False)
    assert f"{len(few)} kernels in " in line
    assert "compile for gfx942" in line
    assert "fits gfx942" in checked.seen("gated_activation")


def test_a_long_compilation_says_how_far_it_is(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(compiling, "compiled", lambda *cell: cell)
    monkeypatch.setattr(compiling, "_PATIENCE_SECONDS", -1.0)
    count = len(compiling.compiled_for(TARGETS["sm_90"], tmp_path))
    assert f"compiled {count} of {count} kernels and configs for sm_90" in caplog.messages[-1]
    caplog.clear()
    monkeypatch.setattr(compiling, "_PATIENCE_SECONDS", 60.0)
    compiling.compiled_for(TARGETS["sm_90"], tmp_path)
    assert not caplog.messages


@pytest.mark.parametrize("target", TARGETS)
def test_a_product_of_matrices_becomes_the_targets_instruction(target, tmp_path):
    found = compiling.compiled(matrix_kernel.KERNEL, matrix_kernel.FITS, TARGETS[target], tmp_path)
    assert not found.problem
    assert found.matrix > 0


def test_a_tile_that_the_compiler_lets_pass_is_refused(tmp_path):
    target = TARGETS["gfx942"]
    found = compiling.compiled(matrix_kernel.KERNEL, matrix_kernel.LARGE, target, tmp_path)
    assert "bytes of shared memory, there are 65536" in found.problem


@pytest.mark.parametrize("target", TARGETS)
def test_a_product_is_rounded_before_a_sum(target, tmp_path):
    """Else codes on a GPU would not be the reference's."""
    apart, together = (
        compiling.compiled(kernel, rounding_kernel.CONFIG, TARGETS[target], tmp_path)
        for kernel in (rounding_kernel.APART, rounding_kernel.TOGETHER)
    )
    assert apart.matrix == 1
    assert together.matrix == 0


def test_scalar_registers_that_a_vector_register_holds_are_not_spilled():
    told = "  .vgpr_count: 300\n  .sgpr_spill_count: 36\n  .vgpr_spill_count: {}\n"
    told += "  .private_segment_fixed_size: {}\n"
    assert compiling._of_gcn(told.format(0, 0)) == (300, 0)
    assert compiling._of_gcn(told.format(3, 0)) == (300, 3)
    assert compiling._of_gcn(told.format(0, 144)) == (300, 144)
