"""Errors that ds-core and the pillars raise.

Every message says what was wrong, the value that was found, what is allowed, and what to do.
A pillar derives its own from `DsError`, so that one `except` clause covers the suite.
"""


class DsError(Exception):
    """Base of every error that the suite raises on purpose."""


class ConfigError(DsError, ValueError):
    """A configuration cannot be honoured. The message names the key by its path."""


class PluginError(DsError, RuntimeError):
    """An installed package registers something that clashes or cannot be loaded."""


class CommError(DsError, RuntimeError):
    """A collective could not complete. The message names the operation, group, caller and ranks."""


class ModelMismatchError(DsError, ValueError):
    """Ranks hold models that differ; the message names the first parameter that does."""


class NonFiniteError(DsError, FloatingPointError):
    """A loss or gradient is not finite. The message names the step, the tensor and the rank."""


class TornError(DsError, RuntimeError):
    """An error ended a step in the middle: parameters and optimizer state are of different steps.

    The message names that error. Loading a checkpoint with its optimizer state puts it right.
    """


class CheckpointError(DsError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class DataError(DsError, RuntimeError):
    """Training data, or what was measured of them, are missing, damaged, or do not fit a run."""


class LaunchError(DsError, RuntimeError):
    """A job could not be started."""


class PlanError(DsError, ValueError):
    """A plan cannot be made: a device, model or cluster is not known or makes no sense."""


class TuningError(DsError, RuntimeError):
    """A search for the best configuration cannot begin, or no trial of it succeeded."""


class BuildError(DsError, RuntimeError):
    """Native code that should build does not."""


class OpError(DsError, RuntimeError):
    """An operation has no implementation that can run here, or was misused."""


class OptimizerError(DsError, ValueError):
    """An optimizer is given arguments, parameters, gradients or state that it cannot work with."""


class TensorFileError(DsError, OSError):
    """A file of tensors cannot be opened, read or written; `errno` and `filename` say more."""
