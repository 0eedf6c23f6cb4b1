"""`ds io`: its commands and options. What they do is in measuring.py and tuning.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Measure and tune asynchronous file I/O.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_SIZES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}

Place = Annotated[
    Path,
    typer.Argument(
        metavar="[PATH]",
        help="A folder on the disk to measure: a file is made there, and removed. Or a file, "
        "which is only read.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Size = Annotated[str, typer.Option(help="Of a pass, such as 256M or 1G.")]


def parse_size(text: str) -> int:
    """Bytes of a text such as 64K, 8M, 1G or 4096. Raises typer.BadParameter for another one."""
    number = text.strip().lower().removesuffix("ib").removesuffix("b")
    factor = _SIZES.get(number[-1:], 1)
    digits = number[:-1] if number[-1:] in _SIZES else number
    if not digits.isdigit() or int(digits) == 0:
        raise typer.BadParameter(f"got {text!r}, expected a size such as 64K, 8M or 1G")
    return int(digits) * factor


@app.command("engines")
def engines_command(json: AsJson = False) -> None:
    """Show which engines can run here, and why the others cannot."""
    from ds_ops.aio.probe import engines

    found = engines()
    if json:
        _print_json(found)
        return
    rows = [(name, reason or "yes") for name, reason in found.items()]
    _print_table("Engines", rows, ("engine", "can run here"))


@app.command("bench")
def bench_command(
    path: Place = Path(),
    engine: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default: all that can run here.")
    ] = None,
    block: Annotated[
        list[str] | None, typer.Option(help="Of one transfer. Repeatable; default: 1M.")
    ] = None,
    depth: Annotated[
        list[int] | None, typer.Option(help="Transfers in flight. Repeatable; default: 32.")
    ] = None,
    size: Size = "256M",
    rounds: Annotated[int, typer.Option(help="Passes of each; the fastest counts.", min=1)] = 5,
    fio: Annotated[bool, typer.Option(help="Compare with fio, where it is installed.")] = True,
    json: AsJson = False,
) -> None:
    """Read and write a file by every engine, around the page cache, and by fio beside them."""
    from ds_ops.aio.measuring import Setting, fio_engines
    from ds_ops.aio.tuning import usable_engines

    names = engine or usable_engines()
    names = [*names, *(f"fio {name}" for name in (fio_engines() if fio else []))]
    blocks = [parse_size(text) for text in block or ["1M"]]
    settings = [
        Setting(name, each, deep) for each in blocks for deep in depth or [32] for name in names
    ]
    with _bench_on(path, parse_size(size), max(blocks)) as (bench, verbs):
        records = bench.measure(settings, verbs, rounds, _report)
    told = {"path": str(path), "size": bench.size, "rows": [each.as_dict() for each in records]}
    _show(told, records, verbs, json)


@app.command("tune")
def tune_command(
    path: Place = Path(),
    size: Size = "256M",
    rounds: Annotated[int, typer.Option(help="Passes of the settings that stay.", min=1)] = 4,
    output: Annotated[
        Path | None, typer.Option(help="Write the best settings, as JSON with an aio section.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Find the settings that read and write fastest, and print them as the `aio` section."""
    import json as json_module

    from ds_ops.aio.tuning import as_section, choose, search, space, usable_engines

    settings = space(usable_engines())
    limit = max(setting.block_bytes for setting in settings)
    with _bench_on(path, parse_size(size), limit) as (bench, verbs):
        ranked = search(bench, settings, verbs, rounds, _report)
    best = choose(ranked)
    section = as_section(best.setting)
    if output is not None:
        output.write_text(json_module.dumps(section, indent=2) + "\n", encoding="utf-8")
    rows = [each.as_dict() for each in ranked]
    _show({"path": str(path), "best": section, "rows": rows}, ranked, verbs, json)
    if not json:
        typer.echo(f"best: {best.setting.engine}, {best.setting.shown} (the least in flight of all")
        typer.echo("that are within 3% of the fastest). For the config:")
        typer.echo(json_module.dumps(section, indent=2))


def _bench_on(path: Path, size: int, block: int) -> Any:
    """A Bench on a file there and the directions in which it may be measured, as a context."""
    import contextlib

    from ds_core.errors import OpError
    from ds_ops.aio.measuring import Bench, scratch_file

    @contextlib.contextmanager
    def opened() -> Any:
        with scratch_file(path, size) as (file, may_write):
            whole = min(size, file.stat().st_size) // block * block
            if whole == 0:
                raise OpError(f"{file}: shorter than one block of {block} bytes; give a larger one")
            with contextlib.closing(Bench(file, whole)) as bench:
                yield bench, ["read", "write"] if may_write else ["read"]

    return opened()


def _report(line: str) -> None:
    typer.echo(line, err=True)


def _show(told: dict[str, Any], records: Any, verbs: list[Any], json: bool) -> None:
    if json:
        _print_json(told)
        return

    def number(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    header = ["engine", "block x depth"]
    for verb in verbs:
        header += [f"{verb} GB/s", "median", "CPU s/GiB"]
    rows = []
    for record in records:
        row = [record.setting.engine, record.setting.shown]
        for verb in verbs:
            row += [number(record.gb_per_s(verb)), number(record.median_gb_per_s(verb))]
            row.append(number(record.cpu_s_per_gib(verb), 3))
        rows.append(row)
    _print_table(f"{told['path']}: the fastest pass of each, and the middle one", rows, header)


def _print_table(title: str, rows: Any, header: Any) -> None:
    from ds_core.cli.tables import table

    typer.echo(table(title, rows, header), nl=False)


def _print_json(told: object) -> None:
    import json

    typer.echo(json.dumps(told, indent=2))
