"""Optimizers that take a step in one pass over memory, with the names and defaults of DeepSpeed.

Each is a `torch.optim.Optimizer`: schedulers, closures, parameter groups and state dicts work as
torch's do, and the state of Adam, Adagrad and SGD moves to torch's classes and back. Parameters
and gradients may be fp32, bf16 or fp16, states are fp32 unless told otherwise.
"""

from ds_ops.optim.adagrad import CPUAdagrad, FusedAdagrad
from ds_ops.optim.adam import CPUAdam, FusedAdam
from ds_ops.optim.adam8bit import Adam8bit
from ds_ops.optim.lamb import FusedLamb
from ds_ops.optim.lion import CPULion, FusedLion
from ds_ops.optim.muon import Muon
from ds_ops.optim.sgd import FusedSGD

__all__ = [
    "Adam8bit",
    "CPUAdagrad",
    "CPUAdam",
    "CPULion",
    "FusedAdagrad",
    "FusedAdam",
    "FusedLamb",
    "FusedLion",
    "FusedSGD",
    "Muon",
]
