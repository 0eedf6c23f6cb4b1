"""Bytes, seconds and counts in the words of a reader, in three figures whatever their size."""

from __future__ import annotations


def told_bytes(size: float) -> str:
    """Such as "0 B", "768 B", "4.19 KiB", "33.7 MiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{int(size)} B" if unit == "B" else f"{_three_figures(value)} {unit}"


def told_seconds(seconds: float) -> str:
    """Such as "312 us", "4.19 ms", "33.7 s", "12 min 5 s"."""
    if seconds >= 100:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_three_figures(seconds / size)} {unit}"
    return f"{_three_figures(seconds * 1e6)} us"


def told_count(value: float) -> str:
    """Such as "0.42", "33.7", "12,345"."""
    return f"{value:,.0f}" if value >= 1000 else _three_figures(value)


def _three_figures(value: float) -> str:
    size = abs(value)
    return f"{value:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"
