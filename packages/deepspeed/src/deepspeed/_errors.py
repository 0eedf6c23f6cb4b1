"""What this package raises itself."""

from __future__ import annotations

from ds_core.errors import DsError


class NotProvidedError(DsError, NotImplementedError):
    """Something of DeepSpeed that is not there was used; the message says what to use."""


class MixedInstallError(DsError, ImportError):
    """Files of the original package and of this one are in the same environment."""
