"""Process groups, named meshes, and collectives whose every byte is counted.

from ds_core import comm

comm.init()                      # torchrun's environment, or a world of one
mesh = comm.Mesh.world()         # one axis, "dp", over all ranks
comm.all_reduce(tensor, mesh.group("dp"), caller="example")
print(mesh.ledger.rows())        # bytes sent by this rank: by operation, group and caller
"""

from ds_core.comm.collectives import (
    Pending,
    all_gather,
    all_gather_object,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    broadcast_object,
    recv,
    reduce_scatter,
    send,
)
from ds_core.comm.environment import init, is_initialized, shutdown
from ds_core.comm.group import Group
from ds_core.comm.ledger import Ledger, LedgerRow, Span
from ds_core.comm.mesh import Mesh
from ds_core.comm.placement import Placement, place, placement_of

__all__ = [
    "Group",
    "Ledger",
    "LedgerRow",
    "Mesh",
    "Pending",
    "Placement",
    "Span",
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object",
    "init",
    "is_initialized",
    "place",
    "placement_of",
    "recv",
    "reduce_scatter",
    "send",
    "shutdown",
]
