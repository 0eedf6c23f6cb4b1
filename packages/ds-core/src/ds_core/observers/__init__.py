"""Observers that ds-core brings: a progress line, and metrics as JSON lines."""

from ds_core.observers.json_lines import JsonLines
from ds_core.observers.progress import Progress
from ds_core.observers.throughput import Throughput

__all__ = ["JsonLines", "Progress", "Throughput"]
