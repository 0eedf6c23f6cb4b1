"""The names of deepspeed.comm again, where the original package defines them."""

from __future__ import annotations

from deepspeed._names import names_of
from deepspeed.comm import HOMES, MISSING

__getattr__, __dir__ = names_of(__name__, HOMES, missing=MISSING)
