"""`ds ops`: what it shows and keeps, with packages of ops made up for the tests."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from ds_core import ops, plugins
from ds_core.cli import main, ops_checks
from ds_core.errors import BuildError, OpError
from ds_core.ops import library, registry
from ds_core.seams import KernelSource


class Fake:
    """An implementation of rms_norm; one that is called needs a name of its own."""

    op, priority, devices = "rms_norm", 10, ("cpu",)

    def __init__(self, name, factor=1.0, reason=None, state="cached"):
        self.name, self.factor, self.reason, self._state = name, factor, reason, state

    def unavailable(self, device_type):
        return self.reason

    def state(self, device_type):
        if isinstance(self._state, Exception):
            raise self._state
        return self._state

    def partly(self):
        return None

    def traced(self):
        return None

    def bind(self, namespace, device_type):
        def kernel(*args):
            y, *rest = ops.get("rms_norm").reference(*args)
            return y * self.factor, *rest

        library.bind_python(self.op, namespace, device_type, kernel)


class FakeTools:
    """What a package adds to `ds ops`."""

    reached = True

    def __init__(self, folder):
        self._folder, self.built, self.measured, self.hash = folder, [], [], "abc"

    def version(self):
        return self.hash

    def folder(self):
        if isinstance(self._folder, Exception):
            raise self._folder
        return self._folder

    def facts(self):
        return {"compiler": "fake++ 1.0"}

    def kernels(self):
        never = "never run on a GPU"
        return [
            KernelSource("rms_norm", "triton", "a1b2c3", never),
            KernelSource("rope", "triton", "d4e5f6", never, ("interpreted", "fits sm_90")),
            KernelSource("rms_norm_backward", "triton", "a1b2c3", never),
        ]

    def build(self, architectures, *, everything, into_package):
        self.built.append((list(architectures), everything, into_package))
        return ["made a library"]

    def benchmarks(self):
        return ["norms", "optim"]

    def unmeasured(self):
        return {"gpu": "there is no GPU"}

    def bench(self, families, *, seconds, only, as_json):
        self.measured.append((list(families), seconds, only, as_json))
        return self.reached


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Installs implementations and tools for one test; returns the tools."""
    tools = FakeTools(tmp_path)
    module = type(sys)("a_pillar")
    module.Tools = lambda: tools
    monkeypatch.setitem(sys.modules, "a_pillar", module)
    entry = EntryPoint("ours", "a_pillar:Tools", "ds_core.op_tools")

    def install(*implementations, with_tools=True):
        monkeypatch.setattr(registry, "_installed", lambda: implementations)
        found = [entry] if with_tools else []
        monkeypatch.setattr(
            plugins, "entry_points", lambda group: found if group == "ds_core.op_tools" else []
        )
        return tools

    yield install
    registry._selected.cache_clear()


@pytest.fixture
def ds(capsys):
    """Runs `ds ops ...` in this process; returns the exit code and what was printed."""

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main(["ops", *words])
        told = capsys.readouterr()
        return ended.value.code or 0, told.out + told.err

    return run


def row_of(shown, op="rms_norm"):
    return next(line for line in shown.splitlines() if line.startswith(f"{op} "))


def test_the_report_shows_who_computes_and_why_not(package, ds):
    package(Fake("best", reason="no compiler; install one"), Fake("next"))
    code, shown = ds("report")
    assert code == 0
    assert row_of(shown).split() == ["rms_norm", "cpu", "next", "cached", "-", "best", "[1]"]
    assert "[1]  no compiler; install one" in shown
    assert "fake++ 1.0" in shown
    assert "Slower than it could be: best on cpu: no compiler; install one" in shown


def test_the_report_as_json_has_the_same_facts(package, ds):
    package(Fake("best", state="will build"))
    found = json.loads(ds("report", "--json")[1])
    row = next(row for row in found["rows"] if row["op"] == "rms_norm")
    assert (row["implementation"], row["state"], row["others"]) == (
        "best", "will build", ["reference"],
    )  # fmt: skip
    assert found["facts"] == {"compiler": "fake++ 1.0"}
    told = "1 ops on cpu have a fast implementation that is built when one is first used"
    assert told in found["advice"][0]


def test_kernels_for_gpus_are_told_with_where_their_source_ran(package, ds):
    package(Fake("best"))
    shown = ds("report")[1]
    assert "Kernels for GPUs" in shown
    (norms,) = [line for line in shown.splitlines() if "a1b2c3" in line]
    assert norms.split("  ")[-1].strip() == "rms_norm, rms_norm_backward"
    assert "never run on a GPU" in norms
    assert "triton  d4e5f6  interpreted, fits sm_90, never run on a GPU  rope\n" in shown
    found, *_ = json.loads(ds("report", "--json")[1])["kernels"]
    assert found == {
        "op": "rms_norm", "implementation": "triton", "source": "a1b2c3",
        "ran": "never run on a GPU",
        "checks": [],
    }  # fmt: skip


def test_what_computes_on_request_is_told_except_for_the_reference(package, ds):
    """Which always can."""
    package(Fake("best"), Fake("other"), Fake("third"))
    assert row_of(ds("report")[1]).endswith("-           other, third on request")
    row = next(
        row for row in json.loads(ds("report", "--json")[1])["rows"] if row["op"] == "rms_norm"
    )
    assert row["others"] == ["other", "third", "reference"]


def test_a_device_without_kernels_is_told(package, ds, monkeypatch):
    package(Fake("of_cpu"))
    for module in ("ops_report", "ops_checks"):
        monkeypatch.setattr(f"ds_core.cli.{module}.device_types", lambda: ["cuda", "cpu"])
    _, shown = ds("report")
    assert "On cuda all ops are computed by plain torch" in shown
    assert "1 of " in shown
    assert "Slower" not in shown
    assert "[1]  for cpu only" in shown


def test_what_cannot_build_is_a_problem_and_not_passed_over(package, ds):
    package(Fake("best", state=BuildError("CXX=nonsense: is not found")))
    _, shown = ds("report")
    assert shown.startswith("CXX=nonsense: is not found")
    assert "cannot build" in row_of(shown)


def test_a_wrong_variable_is_reported_and_breaks_nothing(package, ds, monkeypatch):
    package(Fake("best"))
    monkeypatch.setenv("DS_OPS_IMPL", "rms_norm=none")
    code, shown = ds("report")
    assert code == 0
    assert shown.startswith("op 'rms_norm': no implementation 'none'; there are best, reference")


def test_a_name_that_no_op_has_is_not_told_for_each(package, ds, monkeypatch):
    package(Fake("best"))
    monkeypatch.setenv("DS_OPS_IMPL", "*=none")
    found = json.loads(ds("report", "--json")[1])
    more = len(found["rows"]) - 4
    assert len(found["advice"]) == 5
    assert found["advice"][-1] == f"and {more} more such problems"


def test_a_check_is_shown_by_the_report_until_the_sources_change(package, ds):
    tools = package(Fake("right"))
    code, shown = ds("check", "rms_norm")
    assert code == 0
    assert "all 1 are right" in shown
    today = ops_checks.recorded()["rms_norm", "right", "cpu"].when[:10]
    assert f"error {0:.1e}" not in shown
    assert f", {today}, at abc" in row_of(ds("report")[1])
    tools.hash = "def"
    assert "not checked at this version" in row_of(ds("report")[1])


def test_a_wrong_implementation_fails_the_check(package, ds):
    package(Fake("wrong", factor=1.01))
    code, shown = ds("check", "rms_norm", "--impl", "wrong")
    assert code == 1
    assert "WRONG: torch.float32, case 0: result 0: off by 1.00e-02" in shown
    assert "1 of 1 are wrong" in shown
    assert "WRONG" in row_of(ds("report")[1])


def test_a_check_goes_on_after_an_implementation_that_raises(package, ds):
    class Raising(Fake):
        def bind(self, namespace, device_type):
            raise OpError("torn")

    package(Raising("raising"), Fake("sound"))
    code, shown = ds("check", "rms_norm", "--json")
    rows = {row["implementation"]: row["problem"] for row in json.loads(shown)}
    assert code == 1
    assert rows == {"raising": "torch.float32, case 0: torn", "sound": ""}


def test_a_check_that_cannot_build_says_so_once(package, ds):
    class Broken(Fake):
        def bind(self, namespace, device_type):
            raise BuildError("the compiler failed")

    package(Broken("broken"))
    code, shown = ds("check", "rms_norm")
    assert code != 0
    assert shown.count("the compiler failed") == 1


def test_without_fast_ones_the_reference_is_checked(package, ds):
    package(with_tools=False)
    code, shown = ds("check", "rms_norm")
    assert code == 0
    assert "reference" in shown


def test_a_check_that_cannot_be_kept_says_why(package, ds):
    tools = package(Fake("kept"))
    tools._folder = BuildError("DS_OPS_CACHE=/x: read-only")
    code, shown = ds("check", "rms_norm")
    assert code == 0
    assert "not kept for `ds ops report`: DS_OPS_CACHE=/x: read-only" in shown


def test_a_damaged_record_of_checks_is_as_none(package, ds, tmp_path):
    package(Fake("recorded"))
    for text in ("{", "[1]", '[{"op": "rms_norm"}]', "null"):
        (tmp_path / "checks.json").write_text(text)
        assert row_of(ds("report")[1]).split()[4] == "-"


@pytest.mark.parametrize(
    ("device", "reason", "told"),
    [("cpu", "no compiler", "no compiler"), ("cuda", None, "it is for cuda only")],
)
def test_a_check_of_what_cannot_run_says_why(package, ds, device, reason, told):
    broken = Fake("broken", reason=reason)
    broken.devices = (device,)
    package(broken)
    code, shown = ds("check", "rms_norm", "--impl", "broken")
    assert code != 0
    assert f"no implementation 'broken' of these ops can run here; {told}" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check", "no_op"), "there is no op 'no_op'"),
        (
            ("check", "rms_norm", "--impl", "none"),
            "no implementation 'none' of these ops can run here; there are some, reference",
        ),
        (("bench", "norm"), "no family 'norm'; there are norms, optim"),
        (("bench", "gpu"), "ds ops bench gpu: there is no GPU"),
    ],
    ids=["op", "implementation", "family", "family that cannot be measured"],
)
def test_names_that_do_not_exist_are_errors(package, ds, words, message):
    package(Fake("some"))
    code, shown = ds(*words)
    assert code != 0
    assert message in shown


def test_build_and_bench_reach_the_package(package, ds):
    tools = package()
    assert "made a library" in ds("build")[1]
    ds("build", "--all", "--arch", "x86_64,aarch64", "--arch", "90", "--into-package")
    assert tools.built == [([], False, False), (["x86_64", "aarch64", "90"], True, True)]
    ds("bench", "optim", "--seconds", "0.5", "--only", "adam", "--json")
    assert ds("bench")[0] == 0
    assert tools.measured == [(["optim"], 0.5, "adam", True), (["norms", "optim"], 1.0, "", False)]


def test_only_a_check_fails_for_a_target_that_is_missed(package, ds):
    package().reached = False
    assert ds("bench")[0] == 0
    assert ds("bench", "--check")[0] == 1


@pytest.mark.parametrize("words", [("build",), ("bench",)])
def test_without_a_package_of_ops_the_remedy_is_named(package, ds, words):
    package(with_tools=False)
    code, shown = ds(*words)
    assert code != 0
    assert "pip install ds-ops" in shown


def test_random_ops_are_run_and_not_measured(package, ds, monkeypatch):
    import dataclasses

    random = dataclasses.replace(ops.get("rms_norm"), measured=False)
    monkeypatch.setattr(ops_checks.ops, "get", lambda name: random)
    package(Fake("random", factor=7.0))
    code, shown = ds("check", "rms_norm")
    assert code == 0
    assert row_of(shown).split()[-1] == "ran"


def test_a_check_leaves_memory_as_it_was(package, ds):
    package(Fake("clean"))
    ds("check", "rms_norm")
    assert not torch.are_deterministic_algorithms_enabled()
