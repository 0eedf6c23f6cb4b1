"""Writes the pages of the documentation that are read off the code: docs/config.md, docs/cli.md.

python scripts/generate_docs.py            # write them
python scripts/generate_docs.py --check    # exit 1 if one of them is out of date

All packages of this repository must be installed, and no other that adds to them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from ds_core.cli.app import make_app
from ds_core.config.reference import as_markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTE = "<!-- Written by scripts/generate_docs.py from the code; edit the code. -->\n\n"

CONFIG_INTRODUCTION = """# Config reference

Every key that a config may hold, read off the models that check it. `ds config check FILE` shows
the values in effect for one file, `ds config schema` prints a JSON Schema for editors, and
`ds config reference` prints this table for what is installed on your machine. A value of "auto" is
decided by the package that owns the key.

"""


def config_page() -> str:
    """Every key of the config, from its model."""
    return NOTE + CONFIG_INTRODUCTION + as_markdown()


def commands_page() -> str:
    """Every command with its options, from what `--help` shows."""
    root = typer.main.get_command(make_app())
    lines = ["# Commands", "", "What `ds COMMAND --help` shows, on one page.", ""]
    for words, command in _commands(root, ("ds",)):
        lines += _section(words, command)
    return NOTE + "\n".join(lines).rstrip() + "\n"


def _commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*words, name))


def _section(words: tuple[str, ...], command: Any) -> list[str]:
    context = command.make_context(" ".join(words), [], resilient_parsing=True)
    arguments = [_argument(p) for p in command.get_params(context) if _is_argument(p)]
    arguments += ["COMMAND [ARGS]..."] if hasattr(command, "commands") else []
    usage = " ".join([*words, "[OPTIONS]", *arguments])
    lines = [f"{'#' * min(len(words) + 1, 4)} {' '.join(words)}", "", f"`{usage}`", ""]
    lines += [_prose(command.help or ""), ""]
    rows = [row for param in command.get_params(context) if (row := _row(param, context))]
    if rows:
        lines += ["| argument or option | meaning |", "|---|---|", *rows, ""]
    return lines


def _row(param: Any, context: Any) -> str | None:
    if "--help" in param.opts or getattr(param, "hidden", False):
        return None
    if _is_argument(param):
        name, text = _argument(param), param.help or ""
    else:
        record = param.get_help_record(context)
        if record is None:
            return None
        name, text = record
    return f"| `{_cell(name)}` | {_cell(text)} |"


def _is_argument(param: Any) -> bool:
    return bool(param.param_type_name == "argument")


def _argument(param: Any) -> str:
    """How an argument stands in the usage line."""
    name = param.metavar or str(param.name).upper()
    if not param.required and not name.startswith("["):
        name = f"[{name}]"
    return f"{name}..." if param.nargs == -1 else name


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _prose(text: str) -> str:
    """Help text as Markdown: the paragraphs as they are, without indentation."""
    return "\n".join(line.strip() for line in text.replace("\b", "").strip().splitlines())


PAGES = {"config.md": config_page, "cli.md": commands_page}


def main(arguments: list[str]) -> int:
    """Write or check all pages; 1 if a check found one out of date."""
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    told = ", ".join(stale) or "nothing"
    if "--check" in arguments:
        print(f"out of date: {told}" + ("; run scripts/generate_docs.py" if stale else ""))
        return 1 if stale else 0
    print(f"written: {told}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
