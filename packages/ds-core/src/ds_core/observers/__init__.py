"""Observers that ds-core brings: progress, metrics to any number of sinks, memory, NVTX ranges."""

from ds_core.observers.csv_files import CsvFiles
from ds_core.observers.dashboards import Comet, TensorBoard, Wandb
from ds_core.observers.json_lines import JsonLines
from ds_core.observers.memory import MemoryByPhase
from ds_core.observers.metrics import Metrics
from ds_core.observers.nvtx import NvtxRanges
from ds_core.observers.progress import Progress
from ds_core.observers.sink import Record, Sink
from ds_core.observers.standard import standard_observers
from ds_core.observers.throughput import Throughput

__all__ = [
    "Comet",
    "CsvFiles",
    "JsonLines",
    "MemoryByPhase",
    "Metrics",
    "NvtxRanges",
    "Progress",
    "Record",
    "Sink",
    "TensorBoard",
    "Throughput",
    "Wandb",
    "standard_observers",
]
