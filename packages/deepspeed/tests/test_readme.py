"""The tables of the README hold every public name, and what they say is true of the code."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

import deepspeed
from deepspeed._errors import NotProvidedError
from deepspeed._stand_in import is_stand_in

FOLDER = Path(__file__).parents[1]
README = (FOLDER / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (?P<names>.+?) \| (?P<where>.+) \|$", re.MULTILINE)


def table(title):
    """(names, what stands beside them) of each row of the tables under a title."""
    section = README.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [(row["names"], row["where"]) for row in ROW.finditer(section)]
    return [(re.findall(r"`([\w.]+)`", names), where) for names, where in rows]


def resolve(name):
    """The object of a dotted name, modules imported as needed."""
    module, _, rest = name.partition(".")
    found = importlib.import_module(module)
    path = module
    for part in filter(None, rest.split(".")):
        path = f"{path}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(path)
    return found


PROVIDED = [
    (name, where)
    for names, where in table("Where each name lives")
    for name in names
    if name.startswith("deepspeed.")
]
ABSENT = [name for names, _ in table("What is not there yet") for name in names]


@pytest.mark.parametrize(("name", "where"), PROVIDED, ids=[name for name, _ in PROVIDED])
def test_a_provided_name_is_there_and_where_the_table_says(name, where):
    found = resolve(name)
    assert not is_stand_in(found)
    for home in re.findall(r"`(ds_\w+(?:\.\w+)*)`", where):
        resolve(home)


@pytest.mark.parametrize("name", ABSENT)
def test_an_absent_name_raises_when_it_is_used(name):
    found = resolve(name)
    with pytest.raises(NotProvidedError):
        found() if is_stand_in(found) else found.Anything()


def test_what_skips_without_a_library_is_run_where_the_libraries_are():
    sessions = (FOLDER.parents[1] / "noxfile.py").read_text(encoding="utf-8")
    call = "importor" + "skip("
    for path in Path(__file__).parent.glob("test_*.py"):
        if call in path.read_text(encoding="utf-8"):
            assert f'"packages/deepspeed/tests/{path.name}"' in sessions


def test_the_tables_hold_every_public_name():
    told = {name.removeprefix("deepspeed.") for name, _ in PROVIDED}
    told |= {name.removeprefix("deepspeed.") for name in ABSENT}
    assert set(dir(deepspeed)) - told == set()


def test_the_table_of_commands_is_that_of_the_package():
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    told = {name for names, _ in table("Where each name lives") for name in names}
    assert set(project["scripts"]) - told == set()


def test_the_version_says_whose_it_is():
    assert deepspeed.__version__.startswith("0.19.8+ds.")
    assert deepspeed.__version__ == deepspeed.version
