"""Every public name is there, and the README says what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

import ds_ops

_README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in ds_ops.__all__ if name != "__version__"])
def test_it_is_there_and_in_the_readme(name: str) -> None:
    assert getattr(ds_ops, name).__doc__
    assert f"`{name}`" in _README
