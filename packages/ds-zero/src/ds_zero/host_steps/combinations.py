"""Which of the ways to take a step go together; one place says it for a run and for advice."""

from __future__ import annotations

from ds_zero.errors import ShardError
from ds_zero.host_steps.zenflow import ZenFlow
from ds_zero.offload.choice import Offload


def check_combination(
    stage: int, offload: Offload, *, update_in_backward: bool, zenflow: ZenFlow | None
) -> None:
    """Raise ShardError for choices of which each is fine, but not all of them at once."""
    offload.check_stage(stage)
    if update_in_backward and offload.speculative:
        raise ShardError(
            "update_in_backward: got True with offload.speculative, which keeps gradients to step "
            "again; leave out one of them"
        )
    if zenflow is not None:
        _check_zenflow(offload, update_in_backward)
    if update_in_backward and offload.ratio == "auto":
        raise ShardError(
            'update_in_backward: got True with offload.ratio="auto", which measures a step after '
            "backward; give the ratio as a number"
        )


def _check_zenflow(offload: Offload, update_in_backward: bool) -> None:
    """Raise ShardError where there is no plain step on the host to be divided."""
    reasons = {
        f'the optimizer\'s states are on "{offload.optimizer}"': offload.optimizer != "cpu",
        "offload.ratio leaves some of them on the device": offload.ratio != 1.0,
        "offload.speculative steps everything in backward": offload.speculative,
        "update_in_backward steps everything in backward": update_in_backward,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ShardError(
                f"zenflow: it divides a step that the host takes after backward, but {reason}; "
                f'shard with offload=Offload(optimizer="cpu") and without the other, or leave '
                f"zenflow out"
            )
