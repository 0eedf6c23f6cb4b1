"""`ds plan`: its options. What it does is in `ds_core.planning`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ds_core.errors import PlanError


def add_to(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    file: Annotated[Path, typer.Argument(metavar="CONFIG", help="JSON config file.")],
    params: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Number of parameters (7B, 350M, 1.3e9); sizes are guessed from it."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The model: a Hugging Face config.json (llama, mistral, qwen2, qwen3, gpt2, bert) "
            "or FILE.py:FUNCTION (or MODULE:FUNCTION). The function returns the model, or (model, "
            "batch) for its activations and operations to be counted too; it may take "
            "micro_batch_size. It runs on tensors without data, so any size is possible.",
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="Devices in each node.")] = 8,
    gpu: Annotated[
        str,
        typer.Option(
            help="Kind of device: v100, a100, a100-40g, h100, h200, b200, mi250x, mi300x, l40s, "
            "a10, t4, 3090, 4090, cpu."
        ),
    ] = "h100",
    sequence_length: Annotated[int, typer.Option(help="Tokens per sample.")] = 2048,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Activations are recomputed block by block.")
    ] = False,
    mfu: Annotated[
        float, typer.Option(help="Part of the device's peak that the arithmetic reaches.")
    ] = 0.4,
    rank: Annotated[int, typer.Option(help="Whose memory to show; ranks differ by padding.")] = 0,
    memory_gib: Annotated[
        float | None, typer.Option(help="Memory of a device, in place of the table's.")
    ] = None,
    host_memory_gib: Annotated[
        float | None,
        typer.Option(help="Memory of a node, for what is offloaded; default: not bounded."),
    ] = None,
    disk_gib: Annotated[
        float | None,
        typer.Option(help="Free on a node's disk, for what is offloaded; default: not bounded."),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Its 16-bit operations per second, in 1e12.")
    ] = None,
    intra_gbps: Annotated[
        float | None, typer.Option(help="What it sends within a node, in 1e9 bytes per second.")
    ] = None,
    inter_gbps: Annotated[
        float | None, typer.Option(help="What it sends between nodes, in 1e9 bytes per second.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes and seconds.")] = False,
) -> None:
    """Predict memory per rank, bytes on the wire and the time of a step, for any cluster.

    Nothing is allocated or started. Model state between steps and the bytes sent per step are
    exact; activations, peak and times are estimates, and say so. If it does not fit, the changes
    with which it would are listed. Exits with 1 then.
    """
    from ds_core import config
    from ds_core.cli.plan_report import as_json, render
    from ds_core.planning import (
        Cluster,
        PlanOptions,
        find_device,
        make_plan,
        model_from,
        model_of_size,
        remedies,
    )
    from ds_core.planning.devices import GIB
    from ds_core.planning.plan import precision_on

    if (params is None) == (model is None):
        raise PlanError("ds plan: give the model: either --params N or --model FILE")
    device = find_device(gpu).with_overrides(
        memory_bytes=None if memory_gib is None else memory_gib * GIB,
        flops_16bit=None if tflops is None else tflops * 1e12,
        intra_bandwidth=None if intra_gbps is None else intra_gbps * 1e9,
        inter_bandwidth=None if inter_gbps is None else inter_gbps * 1e9,
    )
    cluster = Cluster(nodes, gpus_per_node, device)
    if params is not None:
        source = model_of_size(params)
    else:
        loaded = config.load(file, world_size=max(1, cluster.size))
        micro = loaded.train_micro_batch_size_per_gpu
        source = model_from(model or "", micro, precision_on(loaded, device))
    options = PlanOptions(
        sequence_length=sequence_length,
        recompute=recompute,
        mfu=mfu,
        rank=rank,
        host_memory_bytes=None if host_memory_gib is None else int(host_memory_gib * GIB),
        disk_bytes=None if disk_gib is None else int(disk_gib * GIB),
    )
    made = make_plan(file, source, cluster, options)
    fixes = remedies(file, made)
    typer.echo(as_json(made, fixes) if json else render(made, fixes), nl=json)
    if not made.fits:
        raise typer.Exit(1)
