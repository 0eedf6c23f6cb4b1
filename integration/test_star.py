"""Pillars stand on ds_core and never on one another, and nothing is cyclic."""

from __future__ import annotations

import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECTS = {
    path.parent.name: tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
PILLARS = [name for name in PROJECTS if name.startswith("ds-") and name != "ds-core"]
MODULES = [name.replace("-", "_") for name in PROJECTS if name.startswith("ds-")]
#: On top of all: nothing imports it.
DROPIN = "deepspeed"


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        *MODULES,
        DROPIN,
        include_external_packages=True,
        exclude_type_checking_imports=True,
        cache_dir=None,
    )


def _requirements(package: str) -> dict[str, Requirement]:
    found = map(Requirement, PROJECTS[package]["dependencies"])
    return {canonicalize_name(requirement.name): requirement for requirement in found}


@pytest.mark.parametrize("module", MODULES)
def test_package_imports_no_pillar_but_itself(graph: grimp.ImportGraph, module: str) -> None:
    pillars = {name.replace("-", "_") for name in PILLARS} - {module}

    crossing = [
        f"{importer} imports {imported}"
        for importer in {module} | graph.find_descendants(module)
        for imported in graph.find_modules_directly_imported_by(importer)
        if imported.split(".")[0] in pillars
    ]

    assert crossing == []


def test_nothing_imports_the_dropin_but_itself(graph: grimp.ImportGraph) -> None:
    inside = {DROPIN} | graph.find_descendants(DROPIN)

    found = {
        f"{importer} imports {module}"
        for module in inside
        for importer in graph.find_modules_that_directly_import(module)
        if importer not in inside
    }

    assert found == set()


def test_no_module_imports_itself_through_others(graph: grimp.ImportGraph) -> None:
    imports = {
        module: {
            imported
            for imported in graph.find_modules_directly_imported_by(module)
            if imported.split(".")[0] in (*MODULES, DROPIN)
        }
        for module in graph.modules
        if module.split(".")[0] in (*MODULES, DROPIN)
    }

    assert _in_cycles(imports) == {}


def _in_cycles(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left after taking away, again and again, what imports or is imported by nothing."""
    left = dict(imports)
    while True:
        imported = set().union(*left.values()) if left else set()
        kept = {
            module: targets & left.keys()
            for module, targets in left.items()
            if targets & left.keys() and module in imported
        }
        if kept == left:
            return kept
        left = kept


def test_cycle_search_finds_a_cycle_and_only_it() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}

    assert _in_cycles(imports) == {"b": {"c"}, "c": {"b"}}


def test_import_linter_guards_every_package() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    linter = config["tool"]["importlinter"]
    layers = next(c for c in linter["contracts"] if c["type"] == "layers")["layers"]

    assert sorted(linter["root_packages"]) == sorted([*MODULES, DROPIN])
    assert (layers[0], layers[-1]) == (DROPIN, "ds_core")
    assert {name.strip() for name in layers[1].split("|")} == set(MODULES) - {"ds_core"}
    assert len(layers) == 3


@pytest.mark.parametrize("pillar", PILLARS)
def test_pillar_depends_on_core_in_a_range_and_on_no_other_pillar(pillar: str) -> None:
    requirements = _requirements(pillar)

    assert set(requirements) & {*PILLARS, "deepspeed-all"} == set()
    assert requirements["ds-core"].specifier.contains(version("ds-core"))
    assert {spec.operator for spec in requirements["ds-core"].specifier} == {">=", "<"}


def test_deepspeed_all_names_every_package_by_compatible_release() -> None:
    requirements = _requirements("deepspeed-all")

    assert set(requirements) == {"ds-core", *PILLARS}
    for name, requirement in requirements.items():
        assert {spec.operator for spec in requirement.specifier} == {"~="}
        assert requirement.specifier.contains(version(name)), f"{name} {version(name)}"


def test_the_dropin_depends_on_every_package_in_a_range() -> None:
    requirements = _requirements(DROPIN)

    assert set(requirements) == {"ds-core", *PILLARS, "torch"}
    for name in ("ds-core", *PILLARS):
        assert {spec.operator for spec in requirements[name].specifier} == {">=", "<"}
        assert requirements[name].specifier.contains(version(name))


def test_the_extra_dropin_names_the_version_that_stands() -> None:
    source = (ROOT / "packages" / DROPIN / "src" / DROPIN / "version.py").read_text("utf-8")
    (text,) = PROJECTS["deepspeed-all"]["optional-dependencies"]["dropin"]

    assert f'"{text.removeprefix("deepspeed==")}"' in source
    assert "+ds." in text


@pytest.mark.parametrize("package", PROJECTS)
def test_every_entry_point_loads(package: str) -> None:
    for group in PROJECTS[package].get("entry-points", {}):
        for entry in entry_points(group=group):
            if canonicalize_name(entry.dist.name) == package:
                entry.load()


@pytest.mark.parametrize("package", PROJECTS)
def test_package_folder_has_what_every_package_has(package: str) -> None:
    folder = ROOT / "packages" / package
    expected = ["README.md", "CHANGELOG.md", "LICENSE", "tests/smoke/smoke.py"]
    if package.startswith("ds-"):
        source = f"src/{package.replace('-', '_')}"
        expected += [f"{source}/{name}" for name in ("__init__.py", "_version.py", "py.typed")]
    if package == DROPIN:
        expected += [f"src/{DROPIN}/{name}" for name in ("__init__.py", "version.py", "py.typed")]

    assert [name for name in expected if not (folder / name).is_file()] == []
