"""The version is stated once and is the one that installers see."""

from __future__ import annotations

from importlib.metadata import version

import ds_ops


def test_version_is_that_of_the_installed_distribution() -> None:
    assert ds_ops.__version__ == version("ds-ops")
