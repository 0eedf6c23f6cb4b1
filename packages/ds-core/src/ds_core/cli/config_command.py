"""`ds config check`, `ds config schema` and `ds config reference`: their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ds_core.cli.groups import command_group
from ds_core.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    config = command_group("Check and document config files.")
    config.command("check")(config_check)
    config.command("schema")(config_schema)
    config.command("reference")(config_reference)
    app.add_typer(config, name="config")


def config_check(
    file: Annotated[Path, typer.Argument(help="JSON file.")],
    world_size: Annotated[int, typer.Option(help="Data-parallel ranks to solve it for.")] = 1,
    meanings: Annotated[
        bool, typer.Option("--meanings", help="Say for every key what it does.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check a config file, and show every value in effect with its origin.

    A file with problems lists all of them, and exits with 2.
    """
    from ds_core.cli.config_table import as_json, render
    from ds_core.config import explain, load

    rows = explain(load(file, world_size=world_size))
    typer.echo(as_json(rows) if json else render(rows, with_meanings=meanings), nl=json)


def config_schema() -> None:
    """Print the JSON Schema of config files, for editors."""
    import json

    from ds_core.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def config_reference(
    key: Annotated[
        str, typer.Argument(help="Only keys that begin with it; default: all.", metavar="[KEY]")
    ] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, with the keys that are refused.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the keys that a config may hold, of all installed packages."""
    from ds_core.cli.config_table import as_json, render_reference
    from ds_core.config.reference import as_markdown, reference

    if markdown:
        typer.echo(as_markdown(), nl=False)
        return
    rows = [row for row in reference() if row.path.startswith(key)]
    if not rows:
        raise ConfigError(f"ds config reference: no key begins with {key!r}")
    typer.echo(as_json(rows) if json else render_reference(rows), nl=json)
