"""`ds checkpoint inspect|verify|export|import`: their options."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ds_core.cli.groups import command_group

_PATH = "Folder of checkpoints, or of one checkpoint; also a URL such as s3://bucket/run."
_TAG = "Which checkpoint. Default: the one that 'latest' names."

Source = Annotated[str, typer.Argument(help=_PATH)]
Tag = Annotated[str | None, typer.Option(help=_TAG)]


class ExportFormat(StrEnum):
    """What an export is to be read by."""

    safetensors = "safetensors"
    dcp = "dcp"


class ImportFormat(StrEnum):
    """Whose checkpoint is imported."""

    deepspeed = "deepspeed"
    dcp = "dcp"
    weights = "weights"


class Dtype(StrEnum):
    """Number formats of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


def add_to(app: typer.Typer) -> None:
    group = command_group("Look into checkpoints, verify, export and import them.")
    group.command("inspect")(checkpoint_inspect)
    group.command("verify")(checkpoint_verify)
    group.command("export")(checkpoint_export)
    group.command("import")(checkpoint_import)
    app.add_typer(group, name="checkpoint")


def checkpoint_inspect(
    path: Source,
    tag: Tag = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what a checkpoint holds: step, sizes, tensors, optimizer groups, client state.

    Reads its index only, so it is fast for a checkpoint of any size.
    """
    from ds_core.checkpoint import inspect
    from ds_core.cli.checkpoint_tables import as_json, inspection_table

    found = inspect(path, tag)
    typer.echo(as_json(found) if json else inspection_table(found, every=tensors), nl=json)


def checkpoint_verify(path: Source, tag: Tag = None) -> None:
    """Read every byte of a checkpoint and compare it with what was saved.

    Every tensor must be stored exactly once and every byte must match its checksum. Exit codes: 0
    if all is well, 1 if anything is damaged (all of it is named), 2 if there is no checkpoint.
    """
    from ds_core.checkpoint import find, verify
    from ds_core.errors import CheckpointError
    from ds_core.quantities import told_bytes

    folder = find(path, tag)
    try:
        found = verify(folder)
    except CheckpointError as error:
        typer.echo(f"ds: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(
        f"{found.path} is whole: {found.num_tensors} tensors, each stored once, in "
        f"{found.num_files} files; {told_bytes(found.num_bytes)} match their checksums"
    )


def checkpoint_export(
    path: Source,
    out: Annotated[Path, typer.Argument(help="Folder to write; created.")],
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="safetensors: as Hugging Face's libraries read it; dcp: for "
            "torch.distributed.checkpoint.load, as FSDP2 and torchtitan do."
        ),
    ] = ExportFormat.safetensors,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Convert floating-point weights. Default: as saved.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest file, such as 500MB or 5GiB (safetensors).")
    ] = "5GB",
    tag: Tag = None,
    exclude_frozen: Annotated[
        bool, typer.Option("--exclude-frozen", help="Leave out what was not trained.")
    ] = False,
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Also write the optimizer's state.")
    ] = False,
    drop_aliases: Annotated[
        bool,
        typer.Option(
            "--drop-aliases",
            help="Write a tied weight once, not under each of its names (safetensors).",
        ),
    ] = False,
    model_key: Annotated[
        str, typer.Option(help="Key above the weights; '' for torchtitan (dcp).")
    ] = "model",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace weights that OUT has (safetensors).")
    ] = False,
) -> None:
    """Write the weights of a checkpoint for others to load, whole, one tensor at a time.

    Needs neither the model nor a GPU, and memory for one tensor. Weights come from the most precise
    copy, such as the fp32 master copy of a bf16 run.
    """
    from ds_core.checkpoint import export_dcp, export_safetensors
    from ds_core.cli.checkpoint_tables import bytes_of, torch_dtype
    from ds_core.quantities import told_bytes

    wanted = torch_dtype(dtype) if dtype else None
    if format is ExportFormat.dcp:
        done = export_dcp(
            path,
            out,
            tag=tag,
            dtype=wanted,
            exclude_frozen=exclude_frozen,
            optimizer=optimizer,
            model_key=model_key,
        )
    else:
        done = export_safetensors(
            path,
            out,
            tag=tag,
            dtype=wanted,
            max_shard_bytes=bytes_of(max_shard_size),
            exclude_frozen=exclude_frozen,
            aliases=not drop_aliases,
            optimizer=optimizer,
            overwrite=overwrite,
        )
    files = f"{len(done.files)} files" if len(done.files) != 1 else done.files[0]
    typer.echo(
        f"wrote {done.num_tensors} tensors, {told_bytes(done.num_bytes)}, to {out} ({files})"
    )


def checkpoint_import(
    source: Annotated[
        Path, typer.Argument(help="What to import: a file, a folder, or a folder of tags.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder of our checkpoints; created.")],
    tag: Annotated[
        str | None, typer.Option(help="Tag of the source, and of ours. Default: the source's own.")
    ] = None,
    format: Annotated[
        ImportFormat | None, typer.Option(help="Whose it is. Default: found from its files.")
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave out optimizer, schedule, client state.")
    ] = False,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            help="A tied weight that the source does not tell of, as lm_head.weight=embed.weight; "
            "may be given several times."
        ),
    ] = None,
    drop_objects: Annotated[
        bool,
        typer.Option(
            "--drop-objects",
            help="Leave out objects that only running code could read, instead of refusing.",
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option(help="Refuse a source of which not every tensor can be placed.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Turn another format's checkpoint into ours, and account for every tensor.

    DeepSpeed's (ZeRO 0 to 3, universal) and torch's distributed checkpoints (FSDP2, torchtitan)
    come with fp32 weights and optimizer state, so training goes on at any stage and world size;
    safetensors and torch state dicts come as weights. No code in the source is run.
    """
    from ds_core.checkpoint import import_checkpoint
    from ds_core.cli.checkpoint_tables import as_json, import_table, pairs_of

    report = import_checkpoint(
        source,
        out,
        tag=tag,
        format=format.value if format else None,
        weights_only=weights_only,
        aliases=pairs_of(alias or [], "--alias"),
        drop_objects=drop_objects,
        strict=strict,
    )
    typer.echo(as_json(report) if json else import_table(report), nl=json)
