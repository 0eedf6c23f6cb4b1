"""What the documentation shows is run: Python blocks, JSON configurations, `ds` commands, links.

A Python block runs in one process, or in N with the info string ```python ranks=N. A block that is
not meant to run carries `no-run` and a reason, as in ```python no-run: needs a GPU; what is an
`excerpt of` a file is looked for there. Tests that a block defines are called.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ds_core.testing import run_ranks

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("packages/*/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
    ]
)
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, the rest of its info string, its text."""

    where: str
    language: str
    options: str
    text: str

    def __str__(self) -> str:
        return self.where


def blocks(page: Path, root: Path = ROOT) -> list[Block]:
    """The fenced blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(source):
        language, _, options = match["info"].strip().partition(" ")
        line = source.count("\n", 0, match.start()) + 1
        where = f"{page.relative_to(root)}:{line}"
        found.append(Block(where, language, options.strip(), match["body"]))
    return found


def num_ranks(block: Block) -> int:
    """Processes that a Python block runs in. Raises ValueError for an option it does not know."""
    if not block.options:
        return 1
    match = re.fullmatch(r"ranks=(\d+)", block.options)
    if match is None:
        raise ValueError(f"{block.where}: got {block.options!r}, expected ranks=N or no-run: WHY")
    return int(match[1])


def ds_commands(block: Block) -> list[list[str]]:
    """The calls of `ds` in a shell block, continuation lines joined, split into words."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        for index, word in enumerate(words):
            if word == "ds" and (index == 0 or words[index - 1] in {"&&", ";", "|", "$"}):
                rest = words[index + 1 :]
                stop = next((i for i, w in enumerate(rest) if w in {"&&", ";", "|", ">"}), None)
                found.append(rest[:stop])
    return found


ALL = [block for page in PAGES for block in blocks(page)]
EXCERPTS = [b for b in ALL if b.options.startswith("no-run: excerpt of ")]
PYTHON = [b for b in ALL if b.language == "python" and not b.options.startswith("no-run:")]
SHELL = [b for b in ALL if b.language in {"bash", "sh", "shell"} and ds_commands(b)]
TESTS = [b for b in PYTHON if re.search(r"^def test_", b.text, re.MULTILINE)]
CONFIGS = [b for b in ALL if b.language == "json"]


def execute(text: str, where: str, folder: str) -> None:
    """Run a block as a script would be, in `folder`."""
    os.chdir(folder)
    exec(compile(text, where, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_block_runs(block: Block, tmp_path: Path) -> None:
    # Without a process group of the test kit: a block starts its own, as its reader's script does.
    run_ranks(num_ranks(block), execute, block.text, block.where, str(tmp_path), initialized=False)


@pytest.mark.parametrize("block", EXCERPTS, ids=str)
def test_an_excerpt_is_in_the_file_that_it_names(block: Block) -> None:
    path = ROOT / block.options.removeprefix("no-run: excerpt of ")

    assert block.text in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("block", TESTS, ids=str)
def test_shown_tests_pass(block: Block, tmp_path: Path) -> None:
    # From a file, because worker processes load functions from files.
    path = tmp_path / f"shown_{re.sub(r'[^a-z0-9]', '_', block.where.lower())}.py"
    path.write_text(block.text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    for name in [name for name in vars(module) if name.startswith("test_")]:
        getattr(module, name)()


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_ds_command_has_the_options_that_are_shown(block: Block) -> None:
    for words in ds_commands(block):
        path = _command_path(words)
        text = _ds_help(tuple(path))
        for option in _own_options(words[len(path) :]):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), (
                f"{block.where}: `ds {' '.join(path)}` has no option {option}"
            )


def _command_path(words: list[str]) -> list[str]:
    """The subcommands at the start of a call: `config check` of `config check FILE`."""
    path: list[str] = []
    for word in words:
        if not re.fullmatch(r"[a-z]+", word) or f" {word} " not in _ds_help(tuple(path)):
            break
        path.append(word)
    return path


def _own_options(words: list[str]) -> list[str]:
    """Options of `ds` itself: those before a script, whose own options follow it."""
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
    return [word.split("=")[0] for word in words[:script] if word.startswith("--")]


@functools.cache
def _ds_help(path: tuple[str, ...]) -> str:
    command = [str(Path(sys.executable).with_name("ds")), *path, "--help"]
    environ = os.environ | {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=environ
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("block", CONFIGS, ids=str)
def test_json_block_is_a_configuration(block: Block) -> None:
    from ds_core import config

    config.load(json.loads(block.text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_links_to_what_exists(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))

    missing = [target for target in LINK.findall(text) if not (page.parent / target).exists()]

    assert missing == []


@pytest.mark.parametrize("readme", sorted(ROOT.glob("packages/*/README.md")), ids=str)
def test_package_readme_opens_with_a_short_runnable_example(readme: Path) -> None:
    first = blocks(readme)[0]

    assert first.language == "python"
    assert num_ranks(first) == 1
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 16


def test_blocks_are_found_with_place_and_options(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text\n\n```python ranks=2\nx = 1\n```\n\n```bash\nds report\n```\n")

    first, second = blocks(page, tmp_path)

    assert (first.where, num_ranks(first), first.text) == ("page.md:3", 2, "x = 1\n")
    assert ds_commands(second) == [["report"]]


def test_ds_commands_are_found_among_others() -> None:
    text = "cd x && ds run --nproc 2 \\\n  a.py --b  # ds no\n$ ds config check f.json | less\n"

    found = ds_commands(Block("here", "bash", "", text))

    assert found == [["run", "--nproc", "2", "a.py", "--b"], ["config", "check", "f.json"]]


def test_unknown_block_option_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'rank=2', expected ranks=N"):
        num_ranks(Block("page.md:1", "python", "rank=2", ""))
