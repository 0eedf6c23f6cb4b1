"""Named axes of ranks: which group a parameter's gradient is averaged over, and so on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ds_core.comm.board import ask
from ds_core.comm.environment import init, wants_check
from ds_core.comm.group import Group
from ds_core.comm.ledger import Ledger
from ds_core.comm.new_group import new_process_group
from ds_core.comm.objects import broadcast_object
from ds_core.comm.process_groups import timeout_of
from ds_core.comm.sequence import SequenceCheck
from ds_core.errors import CommError

#: Axes in their order, outermost (slowest network) first.
AXES = ("pp", "dp", "sp", "tp")


class Mesh:
    """Ranks arranged along named axes, each axis of this rank a `Group`; one ledger for all.

    Args:
        axes: size per axis, any of pp, dp, sp, tp; their product must be the world size. Axes
            that are left out have size 1.
        device_mesh: a torch DeviceMesh to use instead; its dimension names become the axes.

    Raises CommError if the product differs from the world size or an axis is unknown.
    Collective: all ranks must build the same mesh.
    """

    def __init__(self, device_mesh: DeviceMesh | None = None, /, **axes: int) -> None:
        init()
        self.ledger = Ledger()
        self._groups: dict[tuple[str, ...], Group] = {}
        self._subgroups: dict[tuple[int, ...], Group] = {}
        self._check_name: str | None = None
        self._arrange(device_mesh, axes)
        if wants_check():
            self.check_collectives()

    def _arrange(self, device_mesh: DeviceMesh | None, axes: dict[str, int]) -> None:
        if device_mesh is not None:
            names = device_mesh.mesh_dim_names
            if not names or "dp" not in names:
                told = f"dimensions {', '.join(names)}" if names else "no dimension names"
                raise CommError(
                    f"Mesh: the DeviceMesh has {told}; name the one along which data differs dp"
                )
            self.axes = dict(zip(names, device_mesh.shape, strict=True))
            self._device_mesh: DeviceMesh | None = device_mesh
            self._is_own = False
            return
        unknown = sorted(set(axes) - set(AXES))
        if unknown:
            raise CommError(f"Mesh: unknown axis {unknown[0]!r}; the axes are {', '.join(AXES)}")
        self.axes = {name: axes.get(name, 1) for name in AXES}
        world = dist.get_world_size()
        if math.prod(self.axes.values()) != world:
            sizes = " x ".join(f"{name}={size}" for name, size in self.axes.items())
            raise CommError(f"Mesh: {sizes} is not the world size, {world}")
        self._is_own = True
        self._device_mesh = None if self.axes["dp"] == world else self._build()

    @classmethod
    def world(cls) -> Mesh:
        """A mesh whose only axis larger than one is "dp", over all ranks."""
        init()
        return cls(dp=dist.get_world_size())

    def size(self, axis: str) -> int:
        """Ranks along `axis`; 1 for an axis that the mesh does not have."""
        return self.axes.get(axis, 1)

    def group(self, *axes: str) -> Group:
        """This rank's group along one axis, or along several flattened into one.

        Its ranks are in the order of the mesh, whatever the order of `axes`. Collective on first
        use for several axes. Raises CommError for an axis that no mesh has.
        """
        unknown = [axis for axis in axes if axis not in self.axes and axis not in AXES]
        if unknown or not axes:
            told = repr(unknown[0]) if unknown else "none"
            raise CommError(f"Mesh.group: got axis {told}; this mesh has {', '.join(self.axes)}")
        if axes not in self._groups:
            self._groups[axes] = self._make(axes)
        return self._groups[axes]

    def subgroup(self, ranks: Sequence[int]) -> Group:
        """The group of these global ranks, in this order.

        Collective over `ranks` alone: each of them must call with the same ones, and no other.
        Raises CommError for ranks that do not exist, repeat, or leave this one out.
        """
        chosen, world = tuple(ranks), dist.get_world_size()
        outside = [rank for rank in chosen if not 0 <= rank < world]
        if outside or len(set(chosen)) != len(chosen) or dist.get_rank() not in chosen:
            raise CommError(
                f"Mesh.subgroup: got {list(chosen)} on rank {dist.get_rank()}; expected distinct "
                f"ranks of 0 to {world - 1}, this one among them"
            )
        if chosen not in self._subgroups:
            name = f"ranks {', '.join(map(str, chosen))}"
            pg = None
            if len(chosen) > 1:
                pg = new_process_group(
                    chosen,
                    f"making a group of {name}",
                    timeout=_world_timeout(),
                    use_local_synchronization=True,
                    sort_ranks=False,
                )
            self._subgroups[chosen] = self._checked(Group(name, chosen, pg, self.ledger))
        return self._subgroups[chosen]

    def set_timeout(self, timeout_s: float) -> None:
        """Have collectives that cannot complete end after `timeout_s` seconds.

        Holds for the groups of this mesh, those made already and later ones; lanes that were made
        before keep theirs.
        """
        if not timeout_s > 0:
            raise CommError(f"Mesh.set_timeout: got {timeout_s}, expected seconds above 0")
        timeout = timedelta(seconds=timeout_s)
        for group in (self._world(), *self._groups.values(), *self._subgroups.values()):
            group.set_timeout(timeout)

    def check_collectives(self) -> None:
        """From now on compare what the ranks call before data moves: the debugging mode.

        Ranks that call something else, or the same in another order, shape or dtype, end with a
        CommError that says who calls what, and no data moves. See `SequenceCheck` for the cost.
        Lanes that were made before are not compared. Collective over all ranks.
        """
        if self._check_name is not None:
            return
        number = ask(lambda store: store.add("ds_core/check/meshes", 1)) if _is_first() else 0
        self._check_name = str(broadcast_object(number, self._world(), caller="check of the mesh"))
        for group in (*self._groups.values(), *self._subgroups.values()):
            self._checked(group)

    def _world(self) -> Group:
        size = dist.get_world_size()
        return Group("world", range(size), dist.group.WORLD if size > 1 else None, self.ledger)

    def _checked(self, group: Group) -> Group:
        if self._check_name is not None and group.pg is not None and group.backend != "fake":
            name = f"{self._check_name}/{group.lane_name}/{group.ranks[0]}"
            group.check = SequenceCheck(group, name)
        return group

    def _build(self) -> DeviceMesh:
        kept = {name: size for name, size in self.axes.items() if size > 1} or {"dp": 1}
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None or dist.get_backend() == "gloo" else accelerator.type
        return init_device_mesh(device, tuple(kept.values()), mesh_dim_names=tuple(kept))

    def _make(self, axes: tuple[str, ...]) -> Group:
        name = "x".join(axes)
        # In the order of the mesh, in which alone a DeviceMesh can be cut.
        present = tuple(axis for axis in self.axes if axis in axes and self.size(axis) > 1)
        if not present:
            return Group(name, [dist.get_rank()], None, self.ledger)
        if self._device_mesh is None:
            pg = dist.group.WORLD
            if pg is None:
                raise CommError("Mesh: the process group was destroyed; call comm.init() again")
            return self._checked(Group(name, range(dist.get_world_size()), pg, self.ledger))
        if len(present) == 1:
            pg = self._device_mesh.get_group(present[0])
        else:
            pg = self._device_mesh[present]._flatten().get_group()
        group = Group(name, dist.get_process_group_ranks(pg), pg, self.ledger)
        timeout = _world_timeout()
        if self._is_own and timeout is not None:
            group.set_timeout(timeout)  # DeviceMesh takes the backend's default
        return self._checked(group)


def _world_timeout() -> timedelta | None:
    return None if dist.group.WORLD is None else timeout_of(dist.group.WORLD)


def _is_first() -> bool:
    return dist.get_rank() == 0
