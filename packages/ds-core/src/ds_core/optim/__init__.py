"""Optimizers that torch has not, in plain torch: references for faster ones, and good enough."""

from ds_core.optim.lamb import Lamb
from ds_core.optim.lion import Lion
from ds_core.optim.muon import Muon

__all__ = ["Lamb", "Lion", "Muon"]
