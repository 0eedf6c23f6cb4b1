"""What every `Transport` must do: deliver what a dense collective would, within a stated error."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from ds_core import comm
from ds_core.seams import Transport
from ds_core.testing.contracts.base import Contract
from ds_core.testing.faults import poisoned_empty

Factory = Callable[[], Transport]

_PER_RANK = 24  # elements of a shard: several blocks of a small codec, and not a power of two


class TransportContract(Contract):
    """Inherit to test a transport. `factory()` returns the `Transport`.

    Attributes:
        dtypes: of the tensors that it takes.
        error: largest error of an element, relative to the largest element of the tensor that
            was sent; 0 where delivery is exact (a sum in low precision is rounded once).
        dense_share: at most this share of the dense collective's bytes is counted as sent.
    """

    world_sizes = (1, 2, 4)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    error: float = 0.0
    dense_share: float = 1.0

    def test_it_has_every_member_of_the_protocol(self) -> None:
        self.run(_is_a_transport, world_size=1)

    def test_all_gather_delivers_every_shard(self) -> None:
        self.run(_gathers, self.dtypes, self.error)

    def test_reduce_scatter_delivers_the_sum(self) -> None:
        self.run(_reduces, self.dtypes, self.error, False)

    def test_reduce_scatter_accumulates(self) -> None:
        self.run(_reduces, self.dtypes, self.error, True)

    def test_all_reduce_delivers_the_sum_alike_on_all_ranks(self) -> None:
        self.run(_all_reduces, self.dtypes, self.error)

    def test_several_in_flight_do_not_mix(self) -> None:
        self.run(_several_in_flight, self.error)

    def test_results_do_not_depend_on_uninitialised_memory(self) -> None:
        self.run(_survives_poison, self.error)

    def test_it_counts_at_most_its_share_of_the_dense_bytes(self) -> None:
        self.run(_counts_bytes, self.dtypes, self.dense_share)


def _is_a_transport(factory: Factory) -> None:
    assert isinstance(factory(), Transport)


def _values(rank: int, numel: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * salt + rank)
    return torch.randn(numel, generator=generator).to(dtype)


def _close(got: torch.Tensor, expected: torch.Tensor, error: float, largest: float) -> None:
    rounding = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
    allowed = error * largest + 2 * rounding * float(expected.abs().max()) + 1e-6
    worst = float((got.double() - expected).abs().max())
    assert worst <= allowed, f"{got.dtype}: off by {worst:g}, allowed {allowed:g}"


def _gathers(factory: Factory, dtypes: tuple[torch.dtype, ...], error: float) -> None:
    group = comm.Mesh.world().group("dp")
    for dtype in dtypes:
        parts = [_values(rank, _PER_RANK, dtype) for rank in range(group.size)]
        expected = torch.cat(parts).double()
        out = torch.full((_PER_RANK * group.size,), 7.0, dtype=dtype)
        factory().all_gather(out, parts[group.rank], group, caller="contract").wait()
        _close(out, expected, error, float(expected.abs().max()))
        # In place: the shard is this rank's slice of `out`.
        in_place = torch.full_like(out, 7.0)
        own = in_place.view(group.size, -1)[group.rank]
        own.copy_(parts[group.rank])
        factory().all_gather(in_place, own, group, caller="contract").wait()
        assert torch.equal(in_place, out)
        assert _agreed(out, group), "all ranks must see the same values"


def _reduces(
    factory: Factory, dtypes: tuple[torch.dtype, ...], error: float, accumulate: bool
) -> None:
    group = comm.Mesh.world().group("dp")
    for dtype in dtypes:
        full = [_values(rank, _PER_RANK * group.size, dtype) for rank in range(group.size)]
        total = torch.stack(full).double().sum(0).view(group.size, -1)[group.rank]
        out = torch.full((_PER_RANK,), 1.0 if accumulate else float("nan"), dtype=torch.float32)
        mine = full[group.rank].clone()
        factory().reduce_scatter(out, mine, group, accumulate=accumulate, caller="contract").wait()
        largest = sum(float(tensor.abs().max()) for tensor in full)
        _close(out, total + (1.0 if accumulate else 0.0), error, largest)
        assert torch.equal(mine, full[group.rank]), "the input must stay as it was"


def _all_reduces(factory: Factory, dtypes: tuple[torch.dtype, ...], error: float) -> None:
    group = comm.Mesh.world().group("dp")
    for dtype in dtypes:
        full = [_values(rank, _PER_RANK * group.size, dtype) for rank in range(group.size)]
        tensor = full[group.rank].clone()
        factory().all_reduce(tensor, group, caller="contract").wait()
        largest = sum(float(part.abs().max()) for part in full) * group.size
        rounding = error if dtype == torch.float32 else error + torch.finfo(dtype).eps
        _close(tensor, torch.stack(full).double().sum(0), rounding, largest)
        assert _agreed(tensor, group), "all ranks must see the same values"


def _several_in_flight(factory: Factory, error: float) -> None:
    group = comm.Mesh.world().group("dp")
    wire, pending = factory(), []
    for salt in range(4):
        out = torch.empty(_PER_RANK * group.size)
        shard = _values(group.rank, _PER_RANK, torch.float32, salt)
        pending.append((salt, out, wire.all_gather(out, shard, group, caller=f"call {salt}")))
    for salt, out, handle in reversed(pending):
        handle.wait()
        handle.wait()  # twice is harmless
        parts = [_values(rank, _PER_RANK, torch.float32, salt) for rank in range(group.size)]
        expected = torch.cat(parts).double()
        _close(out, expected, error, float(expected.abs().max()))


def _survives_poison(factory: Factory, error: float) -> None:
    with poisoned_empty():
        _gathers(factory, (torch.float32,), error)
        _reduces(factory, (torch.float32,), error, False)
        _reduces(factory, (torch.float32,), error, True)
        _all_reduces(factory, (torch.float32,), error)


def _counts_bytes(factory: Factory, dtypes: tuple[torch.dtype, ...], dense_share: float) -> None:
    mesh = comm.Mesh.world()
    group, numel = mesh.group("dp"), 4096 * dist.get_world_size()
    for dtype in dtypes:
        full = _values(group.rank, numel, dtype)
        shard = full.view(group.size, -1)[group.rank].clone()
        part = numel * dtype.itemsize * (group.size - 1) // group.size
        for op, dense in (("all_gather", part), ("reduce_scatter", part), ("all_reduce", 2 * part)):
            with mesh.ledger.measure() as sent:
                _start(factory(), op, full, shard, group).wait()
            counted = sent.sent_bytes()
            assert counted <= dense_share * dense
            assert counted == sent.sent_bytes(caller="contract"), "counted under the caller"
            assert (counted > 0) == (group.size > 1)


def _start(
    wire: Transport, op: str, full: torch.Tensor, shard: torch.Tensor, group: comm.Group
) -> comm.Pending:
    if op == "all_gather":
        return wire.all_gather(full, shard, group, caller="contract")
    if op == "reduce_scatter":
        return wire.reduce_scatter(shard, full, group, accumulate=False, caller="contract")
    return wire.all_reduce(full, group, caller="contract")


def _agreed(tensor: torch.Tensor, group: comm.Group) -> bool:
    everybody = comm.all_gather_object(tensor, group)
    return all(torch.equal(tensor, other) for other in everybody)
