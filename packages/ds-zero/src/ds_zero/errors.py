"""Errors of ds-zero."""

from ds_core.errors import DsError


class ShardError(DsError, ValueError):
    """A model or optimizer cannot be sharded as asked, or a sharded parameter is misused."""
