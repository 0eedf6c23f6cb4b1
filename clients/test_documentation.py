"""Examples in the documentation that need a library which the other tests do without."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(
    r"^```python no-run: needs [^\n]*`nox -s integrations` runs it[^\n]*\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
FOUND = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in sorted(PAGES.rglob("*.md"))
    for number, text in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("text", FOUND)
def test_an_example_runs_on_two_ranks(launch, tmp_path, text):
    script = tmp_path / "example.py"
    script.write_text(text)
    # It tells nobody anything but by its end.
    launch(script, tmp_path, says=False)
