"""Sizes and durations in the words of a reader."""

from __future__ import annotations

import pytest

from ds_core.quantities import told_bytes, told_count, told_seconds


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (768, "768 B"), (4288, "4.19 KiB"), (35.3e6, "33.7 MiB"), (5e15, "4547 TiB")],
)
def test_bytes_have_three_figures(size, text):
    assert told_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(312e-6, "312 us"), (4.19e-3, "4.19 ms"), (33.7, "33.7 s"), (725, "12 min 5 s")],
)
def test_seconds_have_three_figures(seconds, text):
    assert told_seconds(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.42, "0.42"), (33.71, "33.7"), (12345.6, "12,346")])
def test_counts_have_three_figures(value, text):
    assert told_count(value) == text
