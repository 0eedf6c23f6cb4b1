"""Parameters of layouts drawn at random, and one number for all the layouts they give."""

from __future__ import annotations

import hashlib
import random
from typing import Any

NAMES = ("Dense", "Fixed", "Variable", "BigBird", "BSLongformer", "LocalSlidingWindow")
_DIRECTIONS = ("bidirectional", "unidirectional")


def drawn(name: str, source: random.Random) -> tuple[dict[str, Any], int]:
    """Arguments of `<name>SparsityConfig`, not all of which fit together, and a length."""
    given: dict[str, Any] = {"num_heads": source.randint(1, 6), "block": source.choice((16, 32))}
    if name != "LocalSlidingWindow":
        given["different_layout_per_head"] = source.random() < 0.5
    if name not in ("Dense",):
        given["attention"] = source.choice(_DIRECTIONS)
    if name in ("Fixed", "Variable"):
        given["horizontal_global_attention"] = source.random() < 0.3
    if name in ("Variable", "BigBird"):
        given["num_random_blocks"] = source.randint(0, 2)
    if name in ("BigBird", "BSLongformer", "LocalSlidingWindow"):
        given["num_sliding_window_blocks"] = source.randint(1, 6)
    if name in ("Variable", "BSLongformer"):
        starts = [source.randint(0, 12) for _ in range(source.randint(0, 3))]
        given["global_block_indices"] = starts
        if source.random() < 0.5:
            given["global_block_end_indices"] = [n + source.randint(0, 4) for n in starts]
    if name == "Fixed":
        wide = source.randint(1, 3)
        given["num_global_blocks"] = wide
        given["num_local_blocks"] = wide * source.randint(1, 4)
        given["num_different_global_patterns"] = source.randint(1, 3)
    if name == "Variable":
        sizes = [source.randint(1, 5) for _ in range(source.randint(1, 4))]
        given["local_window_blocks"] = sizes
    if name == "BigBird":
        given["num_global_blocks"] = source.randint(0, 3)
    return given, given["block"] * source.randint(0, 20) + (5 if source.random() < 0.02 else 0)


def made(module: Any, name: str, number: int) -> Any:
    """The layout of one draw, with the random blocks that go with it; None if it is refused."""
    given, length = drawn(name, random.Random(f"{name} {number}"))
    random.seed(number)
    try:
        return getattr(module, f"{name}SparsityConfig")(**given).make_layout(length)
    except (ValueError, NotImplementedError):
        return None


def digest(module: Any, name: str, draws: int) -> str:
    """Of all layouts of so many draws, and of which of them are refused."""
    found = hashlib.sha256()
    for number in range(draws):
        layout = made(module, name, number)
        if layout is None:
            found.update(b"refused")
        else:
            found.update(repr((tuple(layout.shape), str(layout.dtype))).encode())
            found.update(bytes(layout.flatten().tolist()))
    return found.hexdigest()[:16]
