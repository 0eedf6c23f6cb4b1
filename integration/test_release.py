"""The release script writes version and changelog together, or nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    core, zero = tmp_path / "packages" / "ds-core", tmp_path / "packages" / "ds-zero"
    (core / "src" / "ds_core").mkdir(parents=True)
    zero.mkdir()
    (core / "pyproject.toml").write_text('[project]\nname = "ds-core"\n')
    (zero / "pyproject.toml").write_text('[project]\ndependencies = ["ds-core>=0.1,<0.2"]\n')
    (core / "src" / "ds_core" / "_version.py").write_text('"""V."""\n\n__version__ = "0.1.0"\n')
    (core / "CHANGELOG.md").write_text(
        "# Log\n\n## Unreleased\n\n- News.\n\n## 0.1.0 - 2026-01-01\n"
    )
    return tmp_path


def test_release_writes_version_and_dates_the_changelog(release: ModuleType, root: Path) -> None:
    steps = release.prepare(root, "ds-core", "0.1.1", "2026-01-02")

    folder = root / "packages" / "ds-core"
    assert '__version__ = "0.1.1"' in (folder / "src" / "ds_core" / "_version.py").read_text()
    assert (folder / "CHANGELOG.md").read_text() == (
        "# Log\n\n## Unreleased\n\n## 0.1.1 - 2026-01-02\n\n- News.\n\n## 0.1.0 - 2026-01-01\n"
    )
    assert steps == ["git commit, then: git tag ds-core-v0.1.1"]


def test_first_release_keeps_the_version_that_stands(release: ModuleType, root: Path) -> None:
    changelog = root / "packages" / "ds-core" / "CHANGELOG.md"
    changelog.write_text("# Log\n\n## Unreleased\n\n- News.\n")

    release.prepare(root, "ds-core", "0.1.0", "2026-01-02")

    assert "## 0.1.0 - 2026-01-02\n\n- News." in changelog.read_text()


def test_release_names_dependants_that_exclude_it(release: ModuleType, root: Path) -> None:
    steps = release.prepare(root, "ds-core", "0.2.0", "2026-01-02")

    assert steps[0] == "ds-zero excludes ds-core 0.2.0: <0.2,>=0.1"


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("ds-none", "0.2.0", "got 'ds-none', expected one of ds-core, ds-zero"),
        ("ds-core", "0.1.0", "got 0.1.0, expected one after 0.1.0"),
        ("ds-core", "new", "got 'new', expected a form such as 0.2.0"),
    ],
    ids=["unknown-package", "same-version", "not-a-version"],
)
def test_release_refuses(
    release: ModuleType, root: Path, package: str, version: str, message: str
) -> None:
    with pytest.raises(release.ReleaseError, match=message):
        release.prepare(root, package, version, "2026-01-02")


def test_release_without_news_writes_nothing(release: ModuleType, root: Path) -> None:
    folder = root / "packages" / "ds-core"
    (folder / "CHANGELOG.md").write_text("# Log\n\n## Unreleased\n\n## 0.1.0\n\n- Old.\n")

    with pytest.raises(release.ReleaseError, match="nothing under"):
        release.prepare(root, "ds-core", "0.2.0", "2026-01-02")

    assert '"0.1.0"' in (folder / "src" / "ds_core" / "_version.py").read_text()
