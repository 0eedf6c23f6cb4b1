"""Process groups, named meshes, and collectives whose every byte is counted.

from ds_core import comm

comm.init()                      # torchrun's, MPI's or Slurm's environment, or a world of one
mesh = comm.Mesh.world()         # one axis, "dp", over all ranks
comm.all_reduce(tensor, mesh.group("dp"), caller="example")
print(mesh.ledger.rows())        # bytes sent by this rank: by operation, group and caller
"""

from ds_core.comm.barriers import barrier, monitored_barrier
from ds_core.comm.coalesced import (
    all_gather_coalesced,
    all_reduce_coalesced,
    reduce_scatter_coalesced,
)
from ds_core.comm.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from ds_core.comm.environment import init, is_initialized, shutdown
from ds_core.comm.group import Group
from ds_core.comm.ledger import Ledger, LedgerRow, Span, all_rows
from ds_core.comm.mesh import Mesh
from ds_core.comm.objects import (
    all_gather_object,
    broadcast_object,
    gather_object,
    scatter_object,
)
from ds_core.comm.pending import Pending
from ds_core.comm.placement import Placement, place, placement_of
from ds_core.comm.point_to_point import exchange, recv, send
from ds_core.comm.rooted import broadcast, gather, reduce, scatter
from ds_core.comm.traffic import Traffic, TrafficRow, TrafficSummary
from ds_core.comm.uneven import all_gather_uneven, all_to_all_uneven, reduce_scatter_uneven
from ds_core.comm.uneven_batches import UnevenBatches, WeightedBatch

__all__ = [
    "Group",
    "Ledger",
    "LedgerRow",
    "Mesh",
    "Pending",
    "Placement",
    "Span",
    "Traffic",
    "TrafficRow",
    "TrafficSummary",
    "UnevenBatches",
    "WeightedBatch",
    "all_gather",
    "all_gather_coalesced",
    "all_gather_object",
    "all_gather_uneven",
    "all_reduce",
    "all_reduce_coalesced",
    "all_rows",
    "all_to_all",
    "all_to_all_uneven",
    "barrier",
    "broadcast",
    "broadcast_object",
    "exchange",
    "gather",
    "gather_object",
    "init",
    "is_initialized",
    "monitored_barrier",
    "place",
    "placement_of",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_coalesced",
    "reduce_scatter_uneven",
    "scatter",
    "scatter_object",
    "send",
    "shutdown",
]
