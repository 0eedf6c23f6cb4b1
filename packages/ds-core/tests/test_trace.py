"""Traces: slices on lanes, their files, the common clock, overlap, and the commands."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_core.cli import main
from ds_core.errors import DsError
from ds_core.tracing import RankTrace, Slice, load_folder, merge, overlap_of
from ds_core.tracing.intervals import difference, intersection, length, union
from ds_core.tracing.lanes import rows_of
from ds_core.tracing.overlap import longest_waits
from ds_core.tracing.torch_ops import slices_of


def trace(*slices, rank=0, world_size=2, **about):
    about = {"host": "h", "recording": "r", **about}
    return RankTrace(rank, world_size, slices=tuple(slices), **about)


def a_step(rank=0):
    """100 us: 60 of compute, a gather of 40 half hidden, a reduction of 20 that is waited for."""
    return trace(
        Slice("step", "step 4", 0, 100),
        Slice("phase", "forward", 0, 50),
        Slice("phase", "backward", 50, 100),
        Slice("compute", "aten::mm", 10, 40),
        Slice("compute", "aten::mm", 50, 80),
        Slice("gather", "all_gather blocks.0", 20, 60, 0, {"for": "blocks.0"}),
        Slice("wait", "for all_gather blocks.0", 40, 50),
        Slice("reduce", "reduce_scatter blocks.0", 80, 100),
        Slice("wait", "for reduce_scatter blocks.0", 85, 100),
        rank=rank,
    )


# ---------------------------------------------------------------------------- intervals

sets = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted).map(tuple), max_size=8
)
# A busy machine is no failure.
calmly = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def points(intervals):
    return {x for begin, end in intervals for x in range(begin, end)}


@calmly
@given(sets, sets)
def test_intervals_are_sets_of_points(one, other):
    a, b = union(one), union(other)
    assert points(a) == points(one)
    assert all(low[1] < high[0] for low, high in pairwise(a))
    assert points(intersection(a, b)) == points(one) & points(other)
    assert points(difference(a, b)) == points(one) - points(other)
    assert length(a) == len(points(one))


def test_union_closes_gaps():
    assert union([(0, 1), (1.5, 2), (9, 10)], gap=0.5) == [(0, 2), (9, 10)]


@calmly
@given(sets)
def test_slices_of_a_row_do_not_overlap(times):
    placed = rows_of(Slice("gather", "x", begin, end) for begin, end in times)
    assert len(placed) == len(times)
    for row in {each.row for each in placed}:
        mine = sorted((s.begin_us, s.end_us) for s in placed if s.row == row)
        assert all(low[1] <= high[0] for low, high in pairwise(mine))


# ---------------------------------------------------------------------------- overlap


def test_overlap_is_what_is_under_compute():
    (figures,) = overlap_of(a_step())
    assert (figures.step_us, figures.compute_us) == (100, 60)
    assert (figures.gather_us, figures.gather_hidden_us) == (40, 30)
    assert (figures.reduce_us, figures.reduce_hidden_us) == (20, 0)
    assert (figures.communication_us, figures.hidden_us) == (60, 30)
    assert figures.hidden_share == 0.5
    assert figures.wait_us == 25
    assert figures.idle_us == 10


def test_phases_stand_for_compute_where_operations_were_not_recorded():
    slices = [each for each in a_step().slices if each.lane != "compute"]
    (figures,) = overlap_of(trace(*slices, has_ops=False))
    assert figures.compute_us == 100 - 25


def test_a_recording_without_steps_is_told_as_a_whole():
    (figures,) = overlap_of(trace(Slice("compute", "mm", 5, 15), Slice("gather", "g", 15, 25)))
    assert (figures.step, figures.step_us, figures.hidden_share) == ("whole recording", 20, 0.0)


def test_no_communication_is_all_hidden():
    (figures,) = overlap_of(trace(Slice("compute", "mm", 0, 10)))
    assert figures.hidden_share == 1.0


def test_waits_add_up_by_what_was_waited_for():
    waits = longest_waits([a_step(), a_step(rank=1)], number=1)
    assert [(w.rank, w.name, w.count, w.wait_us) for w in waits] == [
        (0, "for reduce_scatter blocks.0", 1, 15)
    ]


# ---------------------------------------------------------------------------- torch's events


def kineto(name, begin, duration, category="cpu_op", thread=1):
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration, "tid": thread}


def marked(*events):
    """Kineto's clock is 1000 us behind ours."""
    marks = [kineto("ds_core.clock", at, 1, "user_annotation") for at in (10, 20)]
    return slices_of([*marks, *events], [(1_010_000, 1_019_000), (1_020_000, 1_020_000)])


def test_operations_move_to_the_clock_of_the_process():
    (only,) = marked(kineto("aten::mm", 100, 5))
    assert (only.lane, only.begin_us, only.end_us) == ("compute", 1100, 1105)


@pytest.mark.parametrize(
    "name",
    ["autograd::engine::evaluate_function: X", "AddmmBackward0", "gloo:all_gather", "c10d::send_"],
)
def test_what_only_encloses_operations_is_no_compute(name):
    assert marked(kineto(name, 100, 5)) == []


def test_on_a_device_kernels_are_the_compute_and_the_messages():
    found = marked(
        kineto("aten::mm", 100, 5),
        kineto("sgemm", 120, 5, "kernel", 7),
        kineto("ncclDevKernel_AllGather_RING_LL(x)", 121, 5, "kernel", 8),
        kineto("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(x)", 130, 5, "kernel", 8),
        kineto("ncclDevKernel_SendRecv(x)", 140, 5, "kernel", 8),
    )
    assert [each.lane for each in found] == ["host", "compute", "gather", "reduce", "other"]


def test_waiting_on_a_device_is_messages_without_compute():
    slices = [Slice("host", "aten::mm", 0, 5), *a_step().on("step", "compute", "gather")]
    (figures,) = overlap_of(trace(*slices))
    assert figures.wait_us == 10


# ---------------------------------------------------------------------------- files


def saved(folder, *ranks):
    for each in ranks:
        each.save(folder / f"rank{each.rank}.json")
    return folder


def test_a_file_holds_what_was_recorded(tmp_path):
    saved(tmp_path, a_step(), a_step(rank=1))
    first, second = load_folder(tmp_path)
    assert sorted(first.slices, key=str) == sorted(a_step().slices, key=str)
    assert (first.host, first.world_size, second.rank) == ("h", 2, 1)


def test_a_merged_file_has_a_process_per_rank_and_a_thread_per_lane(tmp_path):
    merge([a_step(), a_step(rank=1)], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"}
    assert names == {(0, "rank 0 (h)"), (1, "rank 1 (h)")}
    lanes = [e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 1]
    assert lanes == ["compute", "gather", "phases", "reduce", "steps", "waiting"]
    gather = next(e for e in events if e.get("cat") == "gather")
    assert (gather["ts"], gather["dur"], gather["args"]) == (20, 40, {"for": "blocks.0"})


def test_files_of_two_recordings_are_refused(tmp_path):
    saved(tmp_path, a_step(), trace(rank=1, recording="other"))
    with pytest.raises(DsError, match="files of 2 recordings are mixed"):
        load_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"traceEvents": []}', "[1]"])
def test_a_file_that_is_no_trace_is_refused(tmp_path, content):
    (tmp_path / "rank0.json").write_text(content)
    with pytest.raises(DsError, match=r"rank0.json: not a rank's trace of ds-core"):
        load_folder(tmp_path)


# ---------------------------------------------------------------------------- commands


def ds(*words):
    """Run a command; its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code or 0


def test_summary_shows_overlap_and_waits(tmp_path, capsys):
    saved(tmp_path, a_step())
    assert ds("trace", "summary", tmp_path) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("step 4"))
    assert row.split()[2:] == [
        "0", "0.10", "0.06", "0.06", "50%", "0.04", "75%", "0.02", "0%", "0.03", "(25%)", "0.01",
    ]  # fmt: skip
    assert "for reduce_scatter blocks.0" in text
    assert "Ranks that are not in this folder: 1." in text


def test_summary_as_json(tmp_path, capsys):
    saved(tmp_path, a_step(), a_step(rank=1))
    assert ds("trace", "summary", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [step["hidden_share"] for step in found["steps"]] == [0.5, 0.5]
    assert len(found["waits"]) == 4


def test_merge_says_who_is_missing(tmp_path, capsys):
    saved(tmp_path, a_step())
    assert ds("trace", "merge", tmp_path) == 0
    assert "(1 of 2 ranks; not there: ranks 1)" in capsys.readouterr().out
    assert (tmp_path / "trace.json").exists()


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot_draws_a_step(tmp_path, ending):
    pytest.importorskip("matplotlib", reason="needs ds-core[plot]")
    saved(tmp_path, a_step(), a_step(rank=1))
    assert ds("trace", "plot", tmp_path, "-o", tmp_path / f"out.{ending}") == 0
    content = (tmp_path / f"out.{ending}").read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_plot_names_what_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="needs ds-core[plot]")
    import matplotlib

    from ds_core.tracing.plot import draw

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw([a_step()], tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text()
    for words in ("rank 0: step 0.1 ms, 60% computing, 50% of communication hidden", "blocks.0"):
        assert words in text


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["summary", "{}/nothing"], "no rank*.json in it; record some steps with"),
        (["plot", "{}", "--step", "2"], "got step 2, expected 1 to 1"),
        (["plot", "{}", "-o", "{}/nowhere/out.png"], "cannot write"),
        (["plot", "{}", "-o", "{}/out.exe"], "cannot write"),
        (["merge", "{}", "-o", "{}/rank0.json/out"], "cannot write"),
    ],
)
def test_mistakes_are_explained(tmp_path, capsys, words, fragment):
    saved(tmp_path, a_step())
    assert ds("trace", *(word.format(tmp_path) for word in words)) == 2
    assert fragment in capsys.readouterr().err


def test_plot_without_matplotlib_says_what_to_install(tmp_path, capsys, monkeypatch):
    saved(tmp_path, a_step())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert ds("trace", "plot", tmp_path) == 2
    assert "pip install 'ds-core[plot]'" in capsys.readouterr().err
