"""A checkpoint that the original package wrote in another environment: the run goes on here."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def theirs(launch, original, tmp_path_factory):
    """A run of the original package, which saved at each stage after three steps."""
    folder = tmp_path_factory.mktemp("original")
    # It builds C++ at the first collective and waits for whoever does, or was killed doing so.
    builds = str(tmp_path_factory.mktemp("builds"))
    variables = {"LOCAL_SIZE": "2", "TORCH_EXTENSIONS_DIR": builds}
    return launch("engine.py", folder, python=original, **variables)


@pytest.fixture(scope="module")
def ours(launch, theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    return launch("engine.py", folder, "--load", str(theirs.folder))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_run_goes_on_with_the_same_losses(ours, theirs, is_ours, stage):
    assert "+ds." not in theirs["version"]
    assert ("+ds." in ours["version"]) == is_ours
    for mine, other in zip(ours.ranks, theirs.ranks, strict=True):
        assert mine[f"losses{stage}"] == pytest.approx(other[f"losses{stage}"], abs=1e-5)
        assert mine[f"rate{stage}"] == pytest.approx(other[f"rate{stage}"])
        assert mine[f"steps{stage}"] == 3
        assert mine[f"note{stage}"] == f"stage {stage}"
        assert mine[f"path{stage}"]
