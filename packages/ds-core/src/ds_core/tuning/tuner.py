"""Finding the fastest config: what cannot fit is never run, the rest in few, short runs."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ds_core import config as configuration
from ds_core.config.document import read
from ds_core.errors import ConfigError, PlanError, TuningError
from ds_core.planning import (
    Cluster,
    DeviceSpec,
    Plan,
    PlanOptions,
    find_device,
    make_plan,
    model_from,
)
from ds_core.planning.plan import precision_on
from ds_core.tuning.records import BEST, Record, Records, write_best
from ds_core.tuning.search import Run, Search, best_point
from ds_core.tuning.section import AutotuningSection
from ds_core.tuning.space import (
    ACCUMULATION,
    MICRO,
    STAGE,
    TOTAL,
    Point,
    Space,
    default_space,
    micro_batches,
)
from ds_core.tuning.surrogate import Surrogate, knob_features
from ds_core.tuning.trial_runner import Outcome, TrialRunner

logger = logging.getLogger(__name__)

#: Part of the points that fit that are run, and how few runs are never too many.
_RUNS_PER_POINT, _FEW_RUNS = 0.25, 4
#: Steps of the host's own work per micro-batch, for the cost model to correct.
_HOST_S = 1e-3

#: Runs one trial: its name, its config, the measured steps.
Runner = Callable[[str, Mapping[str, Any], int], Outcome]


@dataclass(frozen=True)
class TuningResult:
    """What a search found.

    Attributes:
        best: the config to train with, complete and without the "autotuning" section.
        best_point: what of it was chosen.
        samples_per_second: of all ranks, with it.
        records: every run, in order.
        excluded: points that were never run, and why.
        num_points: points of the space, excluded ones included.
        folder: where results.json and best_config.json are.
    """

    best: dict[str, Any]
    best_point: Point
    samples_per_second: float
    records: Sequence[Record]
    excluded: Mapping[str, str]
    num_points: int
    folder: Path


@dataclass
class _Candidates:
    """The points that may run: their configs and plans."""

    points: list[Point] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)


def tune(
    target: str,
    document: Mapping[str, Any] | str | os.PathLike[str],
    *,
    nproc: int = 1,
    space: Mapping[str, Sequence[Any]] | None = None,
    device: DeviceSpec | None = None,
    sequence_length: int = 2048,
    max_runs: int | None = None,
    timeout_s: float = 600.0,
    runner: Runner | None = None,
    report: Callable[[str], None] | None = None,
) -> TuningResult:
    """Search for the best config for a model on this machine.

    Points that the planner finds too large for the device are never run. The others are predicted,
    and the most promising run for a few steps each in processes of their own; the better half runs
    again for longer, and so on. By default a quarter of the points are run.

    Args:
        target: FILE.py:FUNCTION or MODULE:FUNCTION that returns (model, batch); it may take
            `micro_batch_size`. The model is called with the batch and returns its loss.
        document: the config to start from, or the path of its JSON file; its "autotuning" section
            says how to search.
        nproc: processes on this node.
        space: values by key path, such as {"zero_optimization.stage": (1, 2)}; default: stage,
            micro-batch and prefetching.
        device: what the ranks run on; default: this machine's, as far as it is known.
        sequence_length: tokens per sample, for predictions, if the batch does not tell.
        max_runs: runs at most; default: a quarter of the points that fit, at least 4, and not
            more than the section's tuner_num_trials.
        timeout_s: seconds after which a trial has failed.
        runner: starts trials in place of the default, for other machines and for tests.
        report: called with one line per event; default: nothing is shown.

    Raises TuningError if nothing fits or every trial failed, ConfigError for a config that cannot
    be honoured, PlanError for a target that does not build.
    """
    data = read(document).data
    section = _section(data)
    data.pop("autotuning", None)
    say = report or logger.info
    cluster = Cluster(1, nproc, device or this_device(nproc))
    knobs = _space(data, section, nproc, space)
    found = _candidates(target, data, knobs, cluster, sequence_length, section)
    count = len(found.points)
    budget = _budget(count, section, max_runs)
    say(
        f"{count + len(found.excluded)} points, {len(found.excluded)} excluded without a run; "
        f"at most {budget} runs on {cluster}"
    )
    folder = Path(section.results_dir)
    identity = {"target": target, "config": data, "nproc": nproc, "metric": section.metric}
    records = Records(folder, identity, keep=not section.overwrite)
    start = (
        runner
        or TrialRunner(
            target, nproc, section.start_profile_step, Path(section.exps_dir), timeout_s
        ).run
    )
    measure = _Measure(found, section.metric, records, start, say)
    runs = Search(
        budget,
        section.end_profile_step - section.start_profile_step,
        section.tuner_type if section.fast else "gridsearch",
        section.tuner_early_stopping if section.fast else 0,
    ).run(_surrogate(found, section.metric), count, measure)
    return _result(found, runs, records, folder)


def this_device(nproc: int = 1) -> DeviceSpec:
    """The device of this machine, of which `nproc` ranks share the CPU's memory.

    Its memory is its own; other figures are the table's, of an A100 for one that is not in it.
    """
    import torch

    from ds_core import accelerator
    from ds_core.planning.devices import DEVICES

    kind = accelerator.current().kind
    if kind != "cuda":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return find_device("cpu").with_overrides(memory_bytes=total // nproc)
    properties = torch.cuda.get_device_properties(0)
    name = properties.name.lower()
    known = [spec for key, spec in DEVICES.items() if key in name.replace(" ", "-")]
    spec = known[-1] if known else find_device("a100")
    return spec.with_overrides(memory_bytes=properties.total_memory)


def _section(data: Mapping[str, Any]) -> AutotuningSection:
    from pydantic import ValidationError

    from ds_core.config import problems

    try:
        return AutotuningSection.model_validate(data.get("autotuning", {}))
    except ValidationError as error:
        found = problems.translate(error, AutotuningSection, ("autotuning",))
        raise problems.fail(found, None) from None


def _space(
    data: Mapping[str, Any],
    section: AutotuningSection,
    nproc: int,
    chosen: Mapping[str, Sequence[Any]] | None,
) -> Space:
    micros = micro_batches(
        data,
        nproc,
        least=section.min_train_micro_batch_size_per_gpu,
        most=section.max_train_micro_batch_size_per_gpu,
    )
    default = default_space(data, nproc, micros)
    if not chosen:
        return default
    # What the user names replaces that knob; the micro-batch stays a knob unless it is named.
    return Space({MICRO: default.knobs[MICRO], **chosen})


def _candidates(
    target: str,
    data: Mapping[str, Any],
    space: Space,
    cluster: Cluster,
    sequence_length: int,
    section: AutotuningSection,
) -> _Candidates:
    found = _Candidates()
    first = configuration.load(_usable(data), world_size=cluster.size)
    source = model_from(target, 1, precision_on(first, cluster.device))
    if source.measured is None:
        raise PlanError(
            f"{target}: returned a model only; let it return (model, batch), with a batch of "
            f"micro_batch_size samples that the model is called with"
        )
    options = PlanOptions(sequence_length=sequence_length)
    for point in space.points():
        document = point.applied_to(_free_batch(data, point))
        try:
            plan = make_plan(document, source, cluster, options)
        except (ConfigError, PlanError) as error:
            found.excluded[point.key] = str(error)
            continue
        reason = _why_not(plan, section)
        if reason:
            found.excluded[point.key] = reason
            continue
        found.points.append(point)
        found.documents.append(document)
        found.plans.append(plan)
    _keep_largest(found, section.num_tuning_micro_batch_sizes)
    if not found.points:
        reasons = "; ".join(f"{point}: {why}" for point, why in list(found.excluded.items())[:3])
        raise TuningError(f"ds tune: no point of the space can run: {reasons}")
    return found


def _usable(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config that loads, for its number formats: a batch that is left open is any."""
    if any(isinstance(data.get(key), int) for key in (MICRO, TOTAL)):
        return dict(data)
    return {**data, MICRO: 1}


def _free_batch(data: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """The config without batch keys that contradict a point's own micro-batch."""
    free = copy.deepcopy(dict(data))
    if point.get(MICRO) is not None and isinstance(free.get(TOTAL), int):
        free.pop(ACCUMULATION, None)
    return free


def _why_not(plan: Plan, section: AutotuningSection) -> str:
    total = plan.config.train_batch_size
    most = section.max_train_batch_size
    if total < section.min_train_batch_size or (most is not None and total > most):
        return f"train_batch_size {total} is outside of the limits of the autotuning section"
    if not plan.fits:
        return (
            f"does not fit: the predicted peak is {plan.peak_bytes / 2**30:.2f} GiB of "
            f"{plan.usable_bytes / 2**30:.2f} GiB"
        )
    return ""


def _keep_largest(found: _Candidates, count: int) -> None:
    """Keep the largest micro-batches of each stage that fit; the others are excluded."""
    sizes: dict[Any, set[int]] = {}
    for point, plan in zip(found.points, found.plans, strict=True):
        micro = plan.config.train_micro_batch_size_per_gpu
        sizes.setdefault(point.get(STAGE), set()).add(micro)
    kept = {stage: set(sorted(micros)[-count:]) for stage, micros in sizes.items()}
    for index in reversed(range(len(found.points))):
        point, plan = found.points[index], found.plans[index]
        if plan.config.train_micro_batch_size_per_gpu not in kept[point.get(STAGE)]:
            found.excluded[point.key] = (
                f"not among the {count} largest micro-batches that fit "
                f"(autotuning.num_tuning_micro_batch_sizes)"
            )
            del found.points[index], found.documents[index], found.plans[index]


def _budget(count: int, section: AutotuningSection, max_runs: int | None) -> int:
    if max_runs is not None:
        if max_runs < 1:
            raise TuningError(f"--max-runs: got {max_runs}, expected at least 1")
        return max_runs
    if not section.fast or section.tuner_type != "model_based":
        return min(count, section.tuner_num_trials)
    wanted = max(int(count * _RUNS_PER_POINT), min(_FEW_RUNS, count))
    return min(wanted, section.tuner_num_trials)


def _surrogate(found: _Candidates, metric: str) -> Surrogate:
    rows = []
    for plan in found.plans:
        scale = _scale(plan, metric)
        steps = plan.config.gradient_accumulation_steps
        sent = [
            (plan.cluster.wire_seconds(message.sent_bytes, 0 if not message.sent_bytes else 1))
            for message in plan.costs.messages
        ]
        calls = sum(message.num_calls for message in plan.costs.messages)
        row = (
            plan.time.forward + plan.time.backward,
            steps * _HOST_S,
            sum(sent),
            calls * _HOST_S / 10,
            plan.time.update,
        )
        rows.append([seconds * scale for seconds in row])
    names = list(dict.fromkeys(path for point in found.points for path, _ in point.values))
    values = [[point.get(name) for name in names] for point in found.points]
    return Surrogate(np.array(rows), knob_features(values))


def _scale(plan: Plan, metric: str) -> float:
    """What turns seconds of a step into the cost that is to be small."""
    if metric == "latency":
        return 1.0
    if metric == "flops":
        return 1e12 / plan.flops
    return 1.0 / plan.config.train_batch_size


@dataclass
class _Measure:
    """Runs a point, or takes up what an earlier search found."""

    found: _Candidates
    metric: str
    records: Records
    runner: Runner
    say: Callable[[str], None]

    def __call__(self, index: int, steps: int) -> float | None:
        point, plan = self.found.points[index], self.found.plans[index]
        rung = sum(row.point == point.key for row in self.records.rows)
        record = self.records.earlier(point.key, steps, rung)
        origin = " (from an earlier search)" if record else ""
        if record is None:
            name = f"{len(self.records.rows):03d}"
            outcome = self.runner(name, self.found.documents[index], steps)
            total = plan.config.train_batch_size
            record = Record(
                point=point.key,
                steps=steps,
                rung=rung,
                step_s=outcome.step_s,
                samples_per_second=None if outcome.step_s is None else total / outcome.step_s,
                reason=outcome.reason,
                predicted_step_s=plan.time.total,
            )
        self.records.add(record)
        told = record.reason or f"{record.samples_per_second:,.1f} samples/s"
        self.say(f"run {len(self.records.rows)}: {point.key}: {told}{origin}")
        return None if record.step_s is None else record.step_s * _scale(plan, self.metric)


def _result(
    found: _Candidates, runs: Sequence[Run], records: Records, folder: Path
) -> TuningResult:
    winner = best_point(runs)
    if winner is None:
        reasons = {row.reason for row in records.rows if row.reason}
        raise TuningError(
            f"ds tune: every one of {len(records.rows)} runs failed: {'; '.join(sorted(reasons))}"
        )
    plan = found.plans[winner]
    best = copy.deepcopy(found.documents[winner])
    best[MICRO] = plan.config.train_micro_batch_size_per_gpu
    best[ACCUMULATION] = plan.config.gradient_accumulation_steps
    best.pop(TOTAL, None)
    if TOTAL in found.documents[winner]:
        best[TOTAL] = plan.config.train_batch_size
    write_best(folder / BEST, best)
    point = found.points[winner]
    rates = [
        row.samples_per_second
        for row in records.rows
        if row.point == point.key and row.samples_per_second is not None
    ]
    return TuningResult(
        best=best,
        best_point=point,
        samples_per_second=rates[-1] if rates else math.nan,
        records=tuple(records.rows),
        excluded=dict(found.excluded),
        num_points=len(found.points) + len(found.excluded),
        folder=folder,
    )
