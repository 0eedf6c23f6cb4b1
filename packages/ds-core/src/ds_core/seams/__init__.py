"""The five seams where the packages of the suite meet.

| seam        | question it answers                                 | default here   | provided by |
|-------------|-----------------------------------------------------|----------------|-------------|
| `Sharding`  | who holds parameters, gradients and optimizer state | `Replicated`   | ds-zero     |
| `Runner`    | how micro-batches flow through the model            | `Sequential`   | ds-pipe     |
| `Transport` | how a tensor travels in a collective                | `Dense`        | ds-comm     |
| `Op`        | what computes it                                    | the reference  | ds-ops      |
| `Observer`  | who watches or adjusts at the step's events         | progress, JSON lines | any   |

Beside them, `TensorFiles` moves tensors to and from disk (here: threads; ds-ops: around the page
cache).

Each is a Protocol; a package registers its own under the entry-point group `ds_core.<seam>`.
`ds_core.testing.contracts` has a test base class for each.
"""

from ds_core.seams.observer import Event, EventKind, InputAdjuster, Observer
from ds_core.seams.op import Implementation, KernelSource, Op, OpTools
from ds_core.seams.runner import Runner, Sequential
from ds_core.seams.sharding import (
    FullValues,
    ParkableSharding,
    PassingState,
    ReleasableSharding,
    Sharding,
    ShardingFactory,
    change_freely,
    tearing,
)
from ds_core.seams.tensor_files import TensorFile, TensorFiles, TensorFilesFactory, Transfer
from ds_core.seams.transport import Dense, Transport

__all__ = [
    "Dense",
    "Event",
    "EventKind",
    "FullValues",
    "Implementation",
    "InputAdjuster",
    "KernelSource",
    "Observer",
    "Op",
    "OpTools",
    "ParkableSharding",
    "ReleasableSharding",
    "PassingState",
    "Runner",
    "Sequential",
    "Sharding",
    "ShardingFactory",
    "TensorFile",
    "TensorFiles",
    "TensorFilesFactory",
    "Transfer",
    "Transport",
    "change_freely",
    "tearing",
]
