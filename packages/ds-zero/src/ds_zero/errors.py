"""Errors of ds-zero."""

from ds_core.errors import DsError, TornError


class ShardError(DsError, ValueError):
    """A model or optimizer cannot be sharded as asked, or a sharded parameter is misused."""


class TornShardError(ShardError, TornError):
    """An error has ended a step in the middle, on some rank; a loaded checkpoint mends it."""
