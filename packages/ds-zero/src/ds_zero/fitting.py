"""The least change with which a model fits: settings are tried in the order of what they cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ds_core.precision import Precision
from ds_zero.errors import ShardError
from ds_zero.host_steps.combinations import check_combination
from ds_zero.memory_plan import MemoryPlan, complaints
from ds_zero.offload.choice import Tier
from ds_zero.plan import UnitSpec
from ds_zero.unit_plan import Setup, UnitPlan, plan_unit_buffers

#: Times as many ranks that are proposed.
_MORE_RANKS = (2, 4, 8, 16, 64)
#: Elements of a piece of states that is proposed.
_SMALL_PIECE = 1 << 20
_BF16 = Precision(compute=torch.bfloat16, master=torch.float32)


@dataclass(frozen=True)
class _Option:
    """One value of one setting. cost: how much slower or more trouble, in no unit."""

    told: str
    cost: int
    apply: Callable[[Setup], Setup]


def least_change(
    specs: Sequence[UnitSpec],
    setup: Setup,
    plan_of: Callable[[Sequence[UnitPlan]], MemoryPlan],
    *,
    clips: bool,
) -> str:
    """Advice for a model that does not fit, as one sentence.

    Args:
        specs: the units.
        setup: how the model would be sharded.
        plan_of: makes the plan of other settings for the same room.
        clips: whether gradients are clipped, which updates in backward rule out.
    """
    axes = list(_axes(setup, specs, clips))
    tried = sorted(itertools.product(*axes), key=lambda chosen: sum(each.cost for each in chosen))
    for chosen in tried[1:]:
        changed = _changed(setup, chosen)
        if changed is None:
            continue
        plan = plan_of(plan_unit_buffers(specs, changed))
        if not complaints([plan] * plan.local_ranks):
            told = [option.told for option in chosen if option.told]
            return f"It would fit with {' and '.join(told)}."
    return (
        "No change known here makes it fit: divide the largest unit (units=), take a smaller "
        "model, or give it more room."
    )


def _changed(setup: Setup, chosen: Sequence[_Option]) -> Setup | None:
    """The settings with these changes; None if `shard` refuses to combine them."""
    try:
        for option in chosen:
            setup = option.apply(setup)
        early, zenflow = setup.update_in_backward, setup.zenflow
        check_combination(setup.stage, setup.offload, update_in_backward=early, zenflow=zenflow)
    except ShardError:
        return None
    return setup


def _axes(setup: Setup, specs: Sequence[UnitSpec], clips: bool) -> Iterator[list[_Option]]:
    """For each setting what it is, and what it could be instead."""
    same = _Option("", 0, lambda setup: setup)
    ranks = max(setup.group_of(spec)[0] for spec in specs)
    early = _Option("update_in_backward", 1, lambda setup: replace(setup, update_in_backward=True))
    yield [same] if clips or setup.update_in_backward else [same, early]
    higher = range(setup.stage + 1, 4) if ranks > 1 or not setup.is_host else ()
    offloadable = setup.stage < 3 and not higher
    stages = [_stage(stage, 2 if stage == 2 else 3) for stage in higher]
    # With one rank stage 3 is of use only for shards that leave.
    yield [same, *stages, *([_stage(3, 3)] if offloadable else [])]
    tiers: list[tuple[Tier, int]] = [("nvme", 12)]
    if not setup.is_host:
        tiers.insert(0, ("cpu", 4))
    states, shards = setup.offload.optimizer, setup.offload.parameters
    yield [same, *(_states(tier, cost) for tier, cost in _beyond(states, tiers))]
    yield [same, *(_shards(tier, cost + 2) for tier, cost in _beyond(shards, tiers))]
    smaller = setup.offload.piece_numel > _SMALL_PIECE
    yield [same, *([_pieces()] if smaller else [])]
    yield [same, *(_more(ranks, times, 16 * at) for at, times in enumerate(_MORE_RANKS, 1))]
    wide = all(setup.precision.compute is None and s.dtype == torch.float32 for s in specs)
    bf16 = _Option("bf16 parameters", 18, lambda setup: replace(setup, precision=_BF16))
    yield [same, bf16] if wide else [same]


def _beyond(tier: Tier, tiers: list[tuple[Tier, int]]) -> list[tuple[Tier, int]]:
    """Those further from the device than a tier."""
    order = ("device", "cpu", "nvme")
    return [(other, cost) for other, cost in tiers if order.index(other) > order.index(tier)]


def _stage(stage: int, cost: int) -> _Option:
    return _Option(f"stage {stage}", cost, lambda setup: replace(setup, stage=stage))


def _states(tier: Tier, cost: int) -> _Option:
    def apply(setup: Setup) -> Setup:
        return _with_offload(setup, optimizer=tier, ratio=1.0)

    return _Option(f'the optimizer on "{tier}"', cost, apply)


def _shards(tier: Tier, cost: int) -> _Option:
    def apply(setup: Setup) -> Setup:
        return _with_offload(setup, parameters=tier, max_numel_in_cpu=0)

    return _Option(f'parameters on "{tier}"', cost, apply)


def _pieces() -> _Option:
    def apply(setup: Setup) -> Setup:
        return _with_offload(setup, piece_numel=_SMALL_PIECE)

    return _Option(f"pieces of {_SMALL_PIECE} elements (piece_numel, sub_group_size)", 1, apply)


def _with_offload(setup: Setup, **changes: object) -> Setup:
    # A folder is the user's to choose: until then a disk has all the room.
    folder = setup.offload.folder or "(a folder on a disk)"
    return replace(setup, offload=replace(setup.offload, folder=folder, **changes))  # type: ignore[arg-type]


def _more(ranks: int, times: int, cost: int) -> _Option:
    def apply(setup: Setup) -> Setup:
        before = setup.group_of

        def group_of(spec: UnitSpec) -> tuple[int, int]:
            size, rank = before(spec)
            return size * times, rank

        return replace(setup, group_of=group_of)

    return _Option(f"{ranks * times} ranks on more hosts", cost, apply)
