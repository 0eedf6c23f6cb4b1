"""How every group of commands behaves."""

from __future__ import annotations

import typer


def command_group(summary: str) -> typer.Typer:
    """An empty group: shows its help when called without a command, and no traceback of ours."""
    return typer.Typer(
        help=summary,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
