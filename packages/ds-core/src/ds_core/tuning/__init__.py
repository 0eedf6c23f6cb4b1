"""Finding the fastest config for a model on this machine: `ds tune` as a library.

    from ds_core.tuning import tune

    result = tune("train.py:example", "ds_config.json", nproc=8)
    result.best, result.samples_per_second

What cannot fit is never run (`ds_core.planning` says so); the rest is predicted, and only the most
promising points run, for a few steps each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core._lazy import lazy_names

if TYPE_CHECKING:
    from ds_core.tuning.trial_runner import Outcome
    from ds_core.tuning.tuner import TuningResult, tune

__all__ = ["Outcome", "TuningResult", "tune"]

# The config section of this package is read with every config: it must not import the rest.
_LAZY = {"Outcome": "trial_runner", "TuningResult": "tuner", "tune": "tuner"}

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)
