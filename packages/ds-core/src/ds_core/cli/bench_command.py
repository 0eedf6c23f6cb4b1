"""`ds bench comm`: its options. What it measures is in `ds_core.comm.measuring`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ds_core.cli.groups import command_group

#: Dtypes by the names that people use.
_DTYPES = {
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "double": "float64",
}


def add_to(app: typer.Typer) -> None:
    group = command_group("Measure what a job is made of.")
    group.callback()(_measure)
    group.command("comm")(bench_comm)
    app.add_typer(group, name="bench")


def _measure() -> None:
    # With a callback a single command keeps its name.
    pass


def bench_comm(
    op: Annotated[
        list[str] | None,
        typer.Option(
            help="all_reduce, all_gather, reduce_scatter, all_to_all, broadcast or exchange (a "
            "message around the ring). Repeat for more. Default: all."
        ),
    ] = None,
    nproc: Annotated[
        str, typer.Option(help="Ranks to start here. auto: one per accelerator, at least two.")
    ] = "auto",
    max_elements: Annotated[int, typer.Option(help="Elements of the largest message.", min=1)] = 2
    ** 24,
    min_elements: Annotated[int, typer.Option(help="Of the smallest message.", min=1)] = 2**8,
    only_largest: Annotated[
        bool, typer.Option("--only-largest", help="Measure the largest message alone.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Of the tensors: float32, bfloat16, float16, int64, ...")
    ] = "float32",
    trials: Annotated[int, typer.Option(help="Times that each is measured.", min=1)] = 5,
    warm_ups: Annotated[int, typer.Option(help="Times before that.", min=0)] = 2,
    async_op: Annotated[
        bool, typer.Option("--async-op", help="Start all trials before waiting for the first.")
    ] = False,
    bits: Annotated[
        bool, typer.Option("--bits", help="Bandwidths in Gbit/s instead of GB/s.")
    ] = False,
    backend: Annotated[
        str | None, typer.Option(help="Of torch.distributed. Default: the accelerator's own.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure collectives by message size: time, algorithm bandwidth and bus bandwidth.

    Starts its ranks on this machine. For several hosts start it as any script, such as
    `ds run --hostfile hosts --module ds_core.cli bench comm`. Times are those of the slowest rank;
    sizes and bandwidths are defined as in nccl-tests.
    """
    from ds_core import _env
    from ds_core.comm import is_initialized
    from ds_core.comm.discovery import find_world
    from ds_core.comm.measuring import OPERATIONS, sizes_up_to

    names = op or list(OPERATIONS)
    number_format = _dtype_of(dtype)
    if find_world(_env.whole()) is None and not is_initialized():
        words = ["--dtype", dtype, "--trials", str(trials), "--warm-ups", str(warm_ups)]
        words += ["--max-elements", str(max_elements), "--min-elements", str(min_elements)]
        words += [word for name in names for word in ("--op", name)]
        words += [] if backend is None else ["--backend", backend]
        switches = {
            "--only-largest": only_largest,
            "--async-op": async_op,
            "--bits": bits,
            "--json": json,
        }
        words += [switch for switch, is_on in switches.items() if is_on]
        _start_ranks(nproc, words)
        return
    elements = [max_elements] if only_largest else sizes_up_to(max_elements, min_elements)
    settings = {"trials": trials, "warm_ups": warm_ups, "is_async": async_op}
    _measure_here(names, elements, number_format, backend, settings, bits=bits, json=json)


def _start_ranks(nproc: str, words: list[str]) -> None:
    """The same in several processes, of which the first prints."""
    from ds_core.cli.run_command import number_or
    from ds_core.launcher import LaunchSpec, launch
    from ds_core.launcher.devices import num_devices

    asked = number_or(nproc, "auto", "--nproc")
    count = max(num_devices(), 2) if asked == "auto" else asked
    arguments = ("bench", "comm", *words)
    launch(
        LaunchSpec(
            script="ds_core.cli", args=arguments, nproc=count, is_module=True, reads_env_file=False
        )
    )


def _measure_here(
    names: list[str],
    elements: list[int],
    dtype: Any,
    backend: str | None,
    settings: dict[str, Any],
    *,
    bits: bool,
    json: bool,
) -> None:
    """This rank's part of the measurement; rank 0 prints each operation when it is done."""
    import json as json_module

    from ds_core.comm import Mesh, init, shutdown
    from ds_core.comm.measuring import measure

    init(backend)
    group = Mesh.world().group("dp")
    dtype_name = str(dtype).removeprefix("torch.")
    found = []
    for name in names:
        rows = list(measure(group, [name], elements, dtype=dtype, **settings))
        found += rows
        if group.rank == 0 and not json:
            title = f"{name}, {group.size} ranks over {group.backend}, {dtype_name}"
            typer.echo(_table(title, rows, bits=bits))
    if group.rank == 0 and json:
        told = {"ranks": group.size, "backend": group.backend, "dtype": dtype_name}
        rows_told = [row.as_dict() for row in found]
        typer.echo(json_module.dumps({**told, "rows": rows_told}, indent=2))
    shutdown()


def _table(title: str, rows: list[Any], *, bits: bool) -> str:
    from ds_core.cli.tables import table
    from ds_core.quantities import told_bytes, told_seconds

    unit, factor = ("Gbit/s", 8e-9) if bits else ("GB/s", 1e-9)
    lines = [
        (
            told_bytes(row.message_bytes),
            told_seconds(row.median_s),
            told_seconds(row.fastest_s),
            f"{row.algorithm_bandwidth * factor:.3f}",
            f"{row.bus_bandwidth * factor:.3f}",
        )
        for row in rows
    ]
    header = ("message", "median", "fastest", f"algbw {unit}", f"busbw {unit}")
    return table(title, lines, header)


def _dtype_of(name: str) -> Any:
    """The dtype of a name. Raises CommError for one that is none."""
    import torch

    from ds_core.errors import CommError

    found = getattr(torch, _DTYPES.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise CommError(f"--dtype: got {name!r}, expected one of torch's, such as float32")
    return found
