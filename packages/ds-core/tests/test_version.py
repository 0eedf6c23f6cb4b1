"""The version is stated once and is the one that installers see."""

from __future__ import annotations

from importlib.metadata import version

import ds_core


def test_version_is_that_of_the_installed_distribution() -> None:
    assert ds_core.__version__ == version("ds-core")
