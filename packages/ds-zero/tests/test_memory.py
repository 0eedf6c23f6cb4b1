from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from test_traffic import padded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zero_loops import adamw, sharded, sharded_steps
from zero_models import CASES, WIDTH, Block, Case, square, vectors

import ds_zero
from ds_core.precision import Precision
from ds_core.testing import run_ranks
from ds_zero.offload import Offload

BF16 = Precision(compute=torch.bfloat16, master=torch.float32)
SCALAR_BYTES = 8  # step counts, and the one value behind a sharded parameter


def live_bytes() -> int:
    """Bytes of all tensor storages of this process, scalars left out."""
    gc.collect()
    gc.collect()  # the collector sees some tensors only when what pointed at them is gone
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            with torch._C.DisableTorchFunctionSubclass():
                storage = thing.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(size for size in storages.values() if size > SCALAR_BYTES)


def used_range(unit: ds_zero.optimizer.Unit, itemsize: int, n: int, rank: int) -> int:
    """Elements of this rank's shard from its first parameter's to its last parameter's end."""
    align, end, spans = 64 // itemsize, 0, []
    for spec in unit.specs:
        start = -(-end // align) * align
        end = start + spec.param.numel()
        spans.append((start, end))
    own = padded(unit, itemsize, n) // n
    low, high = rank * own, (rank + 1) * own
    inside = [(max(a, low), min(b, high)) for a, b in spans if max(a, low) < min(b, high)]
    return inside[-1][1] - inside[0][0] if inside else 0


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16-master"])
def test_persistent_bytes_are_the_formula(precision, world_size: int, stage: int):
    used = run_ranks(world_size, check_persistent, stage, precision)
    psi = sum(p.numel() for p in CASES["untied"].build().parameters())
    n, b, k = world_size, (2 if precision else 4), (12 if precision else 8)
    # Summed over ranks and without padding; stage 3 of one rank shards nothing.
    whole = {1: 2 * b * n + k, 2: b * n + b + k, 3: (2 * b if n > 1 else 2 * b * n) + k}[stage]
    assert sum(used) == whole * psi


def check_persistent(stage: int, precision: Precision | None) -> int:
    """Compare with the formulas; the bytes without padding."""
    before = live_bytes()
    case = CASES["untied"]
    model, optimizer = sharded(case, stage, precision=precision)
    sharded_steps(model, optimizer, case, 2)
    b, master = (2, 4) if precision else (4, 0)
    n, rank = dist.get_world_size(), dist.get_rank()
    psi = sum(padded(unit, b, n) for unit in optimizer.units)
    sharded_params = stage == 3 and n > 1
    expected = {
        "parameters": b * (psi // n if sharded_params else psi),
        "gradients": b * (psi if stage == 1 else psi // n),
        "master": master * psi // n,
        "optimizer": 8 * sum(used_range(unit, b, n, rank) for unit in optimizer.units),
    }
    found = optimizer.memory()
    padding = found.pop("padding")
    assert found == expected
    assert live_bytes() - before == sum(expected.values())
    return sum(expected.values()) - padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_estimate_is_what_is_held(dtype: torch.dtype, stage: int):
    for estimate, memory in run_ranks(2, estimate_and_memory, dtype, stage):
        for kind in ("parameters", "gradients", "master", "optimizer"):
            assert memory[kind] == pytest.approx(estimate[kind], abs=64 * 2 * 60)
        assert estimate["persistent"] == pytest.approx(
            sum(memory.values()) - memory["padding"], rel=0.2
        )


def estimate_and_memory(dtype: torch.dtype, stage: int) -> tuple[dict, dict]:
    precision = BF16 if dtype == torch.bfloat16 else None
    estimate = ds_zero.estimate_memory(
        CASES["untied"].build(), stage=stage, world_size=2, dtype=dtype
    )
    model, optimizer = sharded(CASES["untied"], stage, precision=precision)
    sharded_steps(model, optimizer, CASES["untied"], 1)
    return dict(estimate), optimizer.memory()


@pytest.mark.parametrize(
    ("stage", "factor"), [(0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)]
)
def test_estimate_of_a_number_of_parameters(stage: int, factor: float):
    parts = ds_zero.estimate_memory(8_000_000, stage=stage, world_size=8)
    assert parts["persistent"] == factor * 8_000_000


@pytest.mark.parametrize(
    ("options", "device", "host", "disk"),
    [
        ({"offload": Offload(optimizer="cpu")}, 4, 12 / 8 + 4 / 8, 0),
        ({"offload": Offload(optimizer="nvme", folder="/d")}, 4, 4 / 8, 12 / 8),
        ({"update_in_backward": True}, 4 + 8 / 8, 0, 0),
        ({"update_in_backward": True, "offload": Offload(optimizer="cpu")}, 4, 12 / 8, 0),
        (
            {"stage": 3, "offload": Offload("nvme", "nvme", folder="/d")},
            0,
            4 / 8,
            16 / 8,
        ),
    ],
)
def test_estimate_tells_what_leaves_the_device(options, device, host, disk):
    numel = 8_000_000
    parts = ds_zero.estimate_memory(
        numel, **{"stage": 2, "world_size": 8, "dtype": torch.float32, **options}
    )
    found = [parts[place] / numel for place in ("persistent", "host", "disk")]
    assert found == [device, host, disk]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stage": 0, "offload": Offload(optimizer="cpu")}, "stage 0, where nothing is sharded"),
        ({"stage": 2, "offload": Offload(parameters="cpu")}, "use stage 3"),
        ({"stage": 4}, "stage: got 4, expected one of 0, 1, 2, 3"),
        ({"world_size": 0}, "world_size: got 0, expected at least 1"),
        ({"optimizer": "lion"}, "optimizer: got 'lion', expected one of adagrad"),
    ],
    ids=["stage-0", "stage-of-shards", "stage", "world-size", "optimizer"],
)
def test_estimate_refuses_nonsense(wrong: dict, message: str):
    with pytest.raises(ds_zero.ShardError, match=message):
        ds_zero.estimate_memory(10, **{"stage": 1, "world_size": 2, **wrong})


# ---------------------------------------------------------------------- peak at stage 3


class Peak(TorchDispatchMode):
    """The most bytes that storages seen by any operation held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._storages: dict[int, weakref.ref] = {}
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and not thing.is_meta:
                with torch._C.DisableTorchFunctionSubclass():
                    self._note(thing)

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        self.sample()
        return result

    def sample(self) -> None:
        living = [ref() for ref in self._storages.values()]
        self.bytes = max(self.bytes, sum(s.nbytes() for s in living if s is not None))


class Wide(nn.Module):
    """Large blocks and tiny activations."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH, 1500) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("world_size", [2, 4])
def test_stage3_peak_is_two_units_and_their_gradients(world_size: int):
    # Of more than two ranks, the others' parts of one unit's gradient arrive beside it.
    arriving = 0 if world_size == 2 else 1
    for peak, persistent, unit, activations in run_ranks(world_size, stage3_peak):
        assert peak - persistent <= 2 * (unit + unit) + arriving * unit + activations


def stage3_peak() -> tuple[int, int, int, int]:
    case = Case(Wide, square, lambda rank, step: vectors(rank, step, rows=1))
    model, optimizer = sharded(case, 3)
    sharded_steps(model, optimizer, case, 2)
    unit = max(4 * padded(u, 4, dist.get_world_size()) for u in optimizer.units)
    persistent = live_bytes()
    with Peak() as peak:
        sharded_steps(model, optimizer, case, 2, first=2)
    # Saved for backward: four tensors of the hidden width per block; and small temporaries.
    activations = 8 * 4 * 4 * 1500 + 40_000
    return peak.bytes, persistent, unit, activations


# ---------------------------------------------------------------------- freeing


def test_deleting_frees_everything(stage: int):
    run_ranks(2, build_and_delete, stage)


def build_and_delete(stage: int) -> None:
    before = live_bytes()
    case = CASES["untied"]
    model, optimizer = sharded(case, stage)
    sharded_steps(model, optimizer, case, 2)
    watched = [weakref.ref(thing) for thing in (model, optimizer, optimizer.units[0])]
    assert live_bytes() > before
    del model, optimizer
    assert live_bytes() == before
    assert [ref() for ref in watched] == [None, None, None]


def test_deleting_the_optimizer_alone_frees_its_state(stage: int):
    run_ranks(2, delete_optimizer, stage)


def delete_optimizer(stage: int) -> None:
    case = CASES["untied"]
    model, optimizer = sharded(case, stage)
    sharded_steps(model, optimizer, case, 2)
    watched = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watched() is None
    assert all(param.grad is None for param in model.parameters())


def test_close_gives_the_model_back_whole(stage: int):
    run_ranks(2, close_and_go_on, stage)


def close_and_go_on(stage: int) -> None:
    case = CASES["untied"]
    model, optimizer = sharded(case, stage)
    sharded_steps(model, optimizer, case, 2)
    whole = optimizer.full_state_dict()
    optimizer.close()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for name, param in model.named_parameters():
        assert type(param) is nn.Parameter
        assert torch.equal(param, whole[name]), name
    again = adamw(model.parameters())
    case.loss(model, case.inputs(0, 0), 0, 0).backward()
    assert all(param.grad is not None for param in model.parameters())
    again.step()
    loss = case.loss(model, case.inputs(0, 1), 0, 1)
    assert loss.isfinite()


def test_model_can_be_sharded_again_after_close():
    run_ranks(2, reshard)


def reshard() -> None:
    case = CASES["untied"]
    model, optimizer = sharded(case, 3)
    first = sharded_steps(model, optimizer, case, 1)
    optimizer.close()
    optimizer = ds_zero.shard(model, adamw(model.parameters()), 2, min_unit_numel=0)
    second = sharded_steps(model, optimizer, case, 1)
    assert second[0] < first[0] + 1
