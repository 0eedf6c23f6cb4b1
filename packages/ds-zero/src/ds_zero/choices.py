"""What a user chooses when a model is sharded; `ds_zero.shard` says what each means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ds_core.precision import Precision
from ds_core.seams import Dense, Transport
from ds_zero.errors import ShardError
from ds_zero.host_steps.combinations import check_combination
from ds_zero.host_steps.zenflow import ZenFlow
from ds_zero.offload import Offload
from ds_zero.plan import Selector


@dataclass(frozen=True)
class Choices:
    """The arguments of `ds_zero.shard`, as it takes them.

    Raises ShardError for one that makes no sense, and for those that do not go together.
    """

    stage: int
    units: Iterable[Selector] | None = None
    leaf_modules: Iterable[Selector] = ()
    precision: Precision = field(default_factory=Precision)
    max_grad_norm: float | None = None
    min_unit_numel: int = 1 << 18
    prefetch: int = 1
    broadcast: bool = True
    transport: Transport = field(default_factory=Dense)
    offload: Offload = field(default_factory=Offload)
    update_in_backward: bool = False
    check_memory: bool = True
    zenflow: ZenFlow | None = None
    accumulation: int = 1
    scales_gradients: bool = False

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise ShardError(
                f"stage: got {self.stage!r}, expected 1, 2 or 3 (stage 0 is plain data "
                f"parallelism: ds_core.initialize, or torch's DistributedDataParallel)"
            )
        if self.prefetch < 0:
            raise ShardError(f"prefetch: got {self.prefetch}, expected 0 or more")
        if self.update_in_backward and self.max_grad_norm is not None:
            raise ShardError(
                f"update_in_backward: got True with max_grad_norm={self.max_grad_norm}, but the "
                f"norm is known only after backward, when every unit has been updated; leave out "
                f"one of them"
            )
        check_combination(
            self.stage,
            self.offload,
            update_in_backward=self.update_in_backward,
            zenflow=self.zenflow,
        )
        if self.accumulation < 1:
            raise ShardError(f"accumulation: got {self.accumulation}, expected at least 1")

    @property
    def clips(self) -> bool:
        """Whether gradients are multiplied before a step."""
        return self.scales_gradients or self.max_grad_norm is not None
