"""The DeepSpeed that figures are compared with."""

from __future__ import annotations

from types import ModuleType

from ds_core.testing.original import original_deepspeed


def original() -> ModuleType:
    """DeepSpeed itself. Exits where there is none, or this repository's package hides it."""
    if original_deepspeed() is None:
        raise SystemExit(
            "the DeepSpeed team's package is not installed here, or packages/deepspeed hides it; "
            "`nox -s bench` makes an environment that has it"
        )
    import deepspeed

    return deepspeed
