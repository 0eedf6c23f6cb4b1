"""`python -m ds_core.cli` is `ds`."""

from __future__ import annotations

from ds_core.cli import main

main()
