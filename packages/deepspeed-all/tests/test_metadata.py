"""deepspeed-all is metadata: a set of packages that were tested together."""

from __future__ import annotations

from importlib.metadata import files, requires, version

import pytest
from packaging.requirements import Requirement

REQUIRED = [Requirement(text) for text in requires("deepspeed-all") or [] if "extra" not in text]


@pytest.mark.parametrize("requirement", REQUIRED, ids=lambda requirement: requirement.name)
def test_set_pins_a_compatible_release_that_is_installed(requirement: Requirement) -> None:
    assert [spec.operator for spec in requirement.specifier] == ["~="]
    assert requirement.specifier.contains(version(requirement.name))


def test_it_installs_no_module() -> None:
    shipped = [str(path) for path in files("deepspeed-all") or [] if "dist-info" not in str(path)]

    assert [path for path in shipped if path.endswith(".py")] == []
