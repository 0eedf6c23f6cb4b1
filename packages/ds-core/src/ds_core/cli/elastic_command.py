"""`ds elastic`: its options. What it does is in `ds_core.elasticity`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ds_core.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    app.command("elastic")(elastic)


def elastic(
    file: Annotated[
        Path, typer.Argument(metavar="CONFIG", help='JSON config with an "elasticity" section.')
    ],
    world_size: Annotated[
        int | None, typer.Option(help="GPUs: show the batch triangle for so many.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the global batch that an elastic job trains with, and the numbers of GPUs that suit it.

    With --world-size, the micro-batch and accumulation for it, or an error naming the nearest
    numbers that work. The section applies to training as soon as it is enabled.
    """
    import json as json_module

    from pydantic import ValidationError

    from ds_core.config import problems
    from ds_core.config.document import read
    from ds_core.elasticity import ElasticitySection

    values = read(file).data.get("elasticity")
    if values is None:
        raise ConfigError(
            f'{file}: has no "elasticity" section; add {{"elasticity": {{"enabled": true, '
            f'"max_train_batch_size": 2000, "micro_batch_sizes": [2, 4, 6]}}}}'
        )
    try:
        asked = {**values, "enabled": True} if isinstance(values, Mapping) else values
        section = ElasticitySection.model_validate(asked)
    except ValidationError as error:
        found = problems.translate(error, ElasticitySection, ("elasticity",))
        raise problems.fail(found, str(file)) from None
    choice = section.choice()
    told = {
        "train_batch_size": choice.train_batch_size,
        "micro_batch_sizes": list(choice.micro_batch_sizes),
        "gpu_counts": list(choice.gpu_counts),
    }
    if world_size is not None:
        told |= section.triangle(world_size)
    if json:
        typer.echo(json_module.dumps(told, indent=2))
        return
    for key, value in told.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        typer.echo(f"{key + ':':40} {shown}")
    if not values.get("enabled"):
        typer.echo('note: the section is not enabled in the file ("enabled": true)', err=True)
