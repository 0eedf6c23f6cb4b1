"""The troubleshooting page quotes messages that the code still has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTES = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def literals() -> str:
    """All text that stands in strings of the packages, a gap where a value is filled in."""
    found = []
    for path in ROOT.glob("packages/*/src/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


@pytest.fixture(scope="module")
def text() -> str:
    return literals()


@pytest.mark.parametrize("quote", QUOTES)
def test_quoted_message_is_one_of_the_code(quote: str, text: str):
    for piece in quote.split("…"):
        # Punctuation around what is filled in may stand in another string than the words.
        words = piece.strip(" ,.;:?=()")
        assert not words or words in text, f"no message of the packages has {words!r}"


def test_the_page_quotes_messages():
    assert len(QUOTES) >= 20
