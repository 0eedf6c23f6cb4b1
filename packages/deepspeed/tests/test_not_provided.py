"""What is not there can be imported, says what to use when it is used, and typos fail as such."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest

import deepspeed
from deepspeed._absent import ABSENT, AbsentFinder, install
from deepspeed._errors import NotProvidedError
from ds_core.errors import DsError


@pytest.mark.parametrize("package", sorted({name.rpartition(".")[0] for name in ABSENT}))
def test_every_absent_module_and_what_is_below_it_can_be_imported(package):
    importlib.import_module(package)
    for module in (name for name in ABSENT if name.rpartition(".")[0] == package):
        for name in (module, f"{module}.anything"):
            found = importlib.import_module(name)
            with pytest.raises(NotProvidedError, match="is not provided by this package; "):
                found.Whatever()


def test_names_are_imported_as_the_original_has_them():
    from deepspeed.moe.layer import MoE
    from deepspeed.pipe import LayerSpec, PipelineModule

    with pytest.raises(NotProvidedError, match=r"deepspeed\.moe\.layer\.MoE .*ds-moe will bring"):
        MoE(hidden_size=4)
    with pytest.raises(NotProvidedError, match="use ZeRO stage 3"):
        PipelineModule(layers=[])
    with pytest.raises(NotProvidedError, match="LayerSpec"):
        LayerSpec.build  # noqa: B018 - to read it is what raises
    with pytest.raises(NotProvidedError, match="MoE"):
        type("Mine", (MoE,), {})


def test_an_absent_module_is_an_attribute_of_its_parent():
    assert deepspeed.moe.__name__ == "deepspeed.moe"
    with pytest.raises(NotProvidedError):
        deepspeed.moe.layer.MoE()


def test_inspection_is_not_use():
    stand_in = deepspeed.pipe.PipelineModule
    assert not hasattr(deepspeed.pipe, "__wrapped__")
    assert inspect.isclass(stand_in)
    assert not isinstance(object(), stand_in)
    assert "PipelineModule" in repr(stand_in)
    assert "Not provided" in deepspeed.pipe.__doc__


@pytest.mark.parametrize("name", ["deepspeed.monitr", "deepspeed.comm.colls", "deepspeed.x.moe"])
def test_a_misspelt_module_is_not_found(name):
    with pytest.raises(ModuleNotFoundError, match=name.rpartition(".")[0]):
        importlib.import_module(name)


def test_a_misspelt_name_is_not_there():
    for module in (deepspeed, deepspeed.comm, deepspeed.utils):
        with pytest.raises(AttributeError, match="has no attribute 'initialise'"):
            module.initialise  # noqa: B018


def test_there_is_one_finder_and_it_is_asked_last():
    install()
    assert [type(finder) for finder in sys.meta_path].count(AbsentFinder) == 1


def test_the_error_is_of_the_suite_and_of_python():
    assert issubclass(NotProvidedError, DsError)
    assert issubclass(NotProvidedError, NotImplementedError)
