"""Tables as text, for a terminal of any width, a pipe or an issue."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence

#: Width of what goes into a pipe or file: long values stay on their line.
PIPE_WIDTH = 200


def table(title: str, rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """The rows as aligned columns under a title, each line ended by a newline.

    The first column never wraps, so that what is looked up stays in one piece.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    is_terminal = sys.stdout.isatty()
    out = io.StringIO()
    console = Console(
        file=out,
        force_terminal=is_terminal,
        width=None if is_terminal else PIPE_WIDTH,
        highlight=False,
    )
    body = [[Text(str(cell)) for cell in row] for row in rows]
    grid = Table(box=None, show_header=bool(header), pad_edge=False, padding=(0, 2, 0, 0))
    for index in range(max(len(row) for row in [header, *body])):
        grid.add_column(header[index] if header else "", overflow="fold", no_wrap=index == 0)
    for row in body:
        grid.add_row(*row)
    if title:
        console.print(Text(title, style="bold"))
    console.print(grid)
    # rich fills every line up to the column's width.
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
