"""Muon, which `ds_ops.optim.Muon` is here."""

from __future__ import annotations
