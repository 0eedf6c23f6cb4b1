"""Discovery of what installed packages add, and the errors when that goes wrong."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from ds_core import plugins
from ds_core.errors import PluginError


@pytest.fixture
def install(monkeypatch):
    """Pretends that packages with these (name, value) entries are installed."""

    def pretend(*entries):
        made = [EntryPoint(name, value, "ds_core.runners") for name, value in entries]
        monkeypatch.setattr(plugins, "entry_points", lambda group: made)

    return pretend


def test_entries_are_found_without_loading_them(install):
    install(("a", "no_such_module:thing"))
    assert list(plugins.registered("runners")) == ["a"]


def test_an_entry_is_loaded_by_name(install):
    install(("a", "json:loads"))
    assert plugins.load("runners", "a")("[1]") == [1]


def test_two_packages_with_one_name_are_an_error(install):
    install(("a", "one:thing"), ("a", "two:thing"))
    with pytest.raises(PluginError, match=r"one:thing.*two:thing.*'a'; uninstall one"):
        plugins.registered("runners")


def test_one_package_found_twice_is_none(install):
    install(("a", "one:thing"), ("a", "one:thing"))
    assert list(plugins.registered("runners")) == ["a"]


@pytest.mark.parametrize(
    ("seam", "name", "message"),
    [
        ("runners", "b", r"nothing installed provides 'b' \(registered: \['a'\]\)"),
        ("sharding", "zero_optimization", r"'zero_optimization' \(pip install ds-zero\)"),
    ],
    ids=["unknown", "known-provider"],
)
def test_a_name_that_nobody_provides_is_an_error(install, seam, name, message):
    install(("a", "one:thing"))
    with pytest.raises(PluginError, match=message):
        plugins.load(seam, name)


def test_an_entry_that_does_not_load_names_its_cause(install):
    install(("a", "no_such_module:thing"))
    with pytest.raises(PluginError, match=r"'a' of .* does not load: No module named 'no_such"):
        plugins.load("runners", "a")


def test_what_is_installed_is_read_once_for_each_search_path(monkeypatch, tmp_path):
    reads = []
    monkeypatch.setattr(
        plugins.metadata, "entry_points", lambda: reads.append(1) or plugins.EntryPoints(())
    )
    plugins._all_entries.cache_clear()
    try:
        assert plugins.registered("ops") == plugins.registered("config") == {}
        assert len(reads) == 1
        monkeypatch.syspath_prepend(str(tmp_path))
        plugins.registered("ops")
        assert len(reads) == 2
    finally:
        plugins._all_entries.cache_clear()
