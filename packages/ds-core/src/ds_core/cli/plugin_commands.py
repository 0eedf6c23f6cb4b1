"""Commands that installed packages add, through entry points of group `ds_core.commands`.

An entry is a `typer.Typer` app, or a callable that takes the list of arguments after the
command's name and returns an exit code or None. It is imported when its command is invoked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.metadata import EntryPoint

import typer

from ds_core import plugins
from ds_core.errors import PluginError

#: No word is an option here, not even --help: all are for the command itself.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def add_plugin_commands(app: typer.Typer, *, taken: Collection[str]) -> None:
    """Add a command for each entry. Raises PluginError if one has the name of another."""
    for name, entry in sorted(plugins.registered("commands").items()):
        source = entry.dist.name if entry.dist is not None else entry.value
        if name in taken:
            raise PluginError(
                f"ds_core.commands: {source} registers {name!r}, which is a command of ds-core; "
                f"uninstall {source}, or ask for another name"
            )
        app.command(name, help=f"Provided by {source}.", context_settings=dict(_PASS_ON))(
            _forward(name, entry)
        )


def _forward(name: str, entry: EntryPoint) -> Callable[..., None]:
    def command(context: typer.Context) -> None:
        target = plugins.load("commands", name)
        if isinstance(target, typer.Typer):
            target(args=list(context.args), prog_name=f"ds {name}")
        elif callable(target):
            raise typer.Exit(target(list(context.args)) or 0)
        else:
            raise PluginError(
                f"ds_core.commands: {name!r} ({entry.value}) is {target!r}; expected a typer app "
                "or a callable that takes the list of arguments"
            )

    # typer reads the signature at run time; postponed annotations of a closure need a hint.
    command.__annotations__ = {"context": typer.Context, "return": None}
    return command
