"""Prepare a release of one package.

    python scripts/release.py ds-zero 0.2.0

writes the version, dates the package's changelog, and prints what is left to do: the tag, and the
packages whose range excludes the new version. It commits and publishes nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parent.parent
UNRELEASED = "## Unreleased\n"


class ReleaseError(ValueError):
    """The release cannot be prepared; nothing was written."""


def prepare(root: Path, package: str, version: str, today: str) -> list[str]:
    """Write version and changelog of `package`; return the steps that are left.

    Raises ReleaseError for an unknown package, a version that is not newer than the present one,
    or a changelog with nothing under "Unreleased".
    """
    folder = root / "packages" / package
    if not (folder / "pyproject.toml").is_file():
        known = sorted(path.parent.name for path in root.glob("packages/*/pyproject.toml"))
        raise ReleaseError(f"package: got {package!r}, expected one of {', '.join(known)}")
    version_file = _version_file(folder)
    text = version_file.read_text(encoding="utf-8")
    present = re.search(r'version(?:__)? = "([^"]+)"', text)
    if present is None:
        raise ReleaseError(f"{version_file} states no version")
    changelog = folder / "CHANGELOG.md"
    log = changelog.read_text(encoding="utf-8")
    _check_newer(present[1], version, was_released=f"\n## {present[1]} " in log)
    log = _dated(log, version, today, str(changelog))
    start, end = present.span(1)
    version_file.write_text(text[:start] + version + text[end:], encoding="utf-8")
    changelog.write_text(log, encoding="utf-8")
    dependants = _excluding(root, package, version)
    steps = [f"{name} excludes {package} {version}: {spec}" for name, spec in dependants]
    return [*steps, f"git commit, then: git tag {package}-v{version}"]


def _version_file(folder: Path) -> Path:
    found = [*folder.glob("src/*/_version.py"), *folder.glob("src/*/version.py")]
    return found[0] if found else folder / "pyproject.toml"


def _check_newer(present: str, version: str, *, was_released: bool) -> None:
    try:
        wanted = Version(version)
    except InvalidVersion as error:
        raise ReleaseError(f"version: got {version!r}, expected a form such as 0.2.0") from error
    if wanted < Version(present) or (wanted == Version(present) and was_released):
        raise ReleaseError(f"version: got {version}, expected one after {present}")


def _dated(changelog: str, version: str, today: str, where: str) -> str:
    """The changelog with what was unreleased under `version`."""
    before, found, after = changelog.partition(UNRELEASED)
    entries = after.split("\n## ", maxsplit=1)[0].strip()
    if not found or not entries:
        raise ReleaseError(f'{where}: nothing under "Unreleased"; say there what changed')
    return f"{before}{UNRELEASED}\n## {version} - {today}\n{after}"


def _excluding(root: Path, package: str, version: str) -> list[tuple[str, str]]:
    """Packages that would not accept `package` at `version`, with their range."""
    found = []
    for path in sorted(root.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {}).values()
        texts = [*project.get("dependencies", []), *(text for extra in extras for text in extra)]
        for requirement in map(Requirement, texts):
            same = canonicalize_name(requirement.name) == package
            if same and not requirement.specifier.contains(version, prereleases=True):
                found.append((path.parent.name, str(requirement.specifier)))
    return found


def main(arguments: list[str]) -> int:
    """Entry point of the script; returns its exit status."""
    parser = argparse.ArgumentParser(description="Prepare a release of one package.")
    parser.add_argument("package", help="a folder of packages/, such as ds-zero")
    parser.add_argument("version", help="the new version, such as 0.2.0")
    options = parser.parse_args(arguments)
    try:
        steps = prepare(ROOT, options.package, options.version, f"{datetime.now(UTC):%Y-%m-%d}")
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    print("\n".join(steps))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
