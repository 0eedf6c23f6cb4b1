"""The original's builders of operators; here one library holds those for the CPU."""

from __future__ import annotations

from types import ModuleType

import ds_ops.optim
from ds_core.errors import BuildError
from ds_ops.tools import Tools


class _Builder:
    """Builds one operator ahead of its first use.

    Attributes:
        NAME: of the operator in the original.
    """

    NAME = ""

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether it builds here, or is built."""
        try:
            self.load(verbose)
        except BuildError:
            return False
        return True

    def load(self, verbose: bool = True) -> ModuleType:
        """Build it unless that is done; the module of ds_ops that has it.

        Raises BuildError if there is no compiler, or it does not build.
        """
        Tools().build((), everything=False, into_package=False)
        return ds_ops.optim

    def builder(self) -> _Builder:
        """Itself."""
        return self


class _FusedBuilder(_Builder):
    """Of an operator on a device, which torch or triton compiles at first use."""

    def load(self, verbose: bool = True) -> ModuleType:
        """Nothing to build; the module of ds_ops that has it."""
        return ds_ops.optim


class CPUAdamBuilder(_Builder):
    """Of `DeepSpeedCPUAdam`."""

    NAME = "cpu_adam"


class CPUAdagradBuilder(_Builder):
    """Of `DeepSpeedCPUAdagrad`."""

    NAME = "cpu_adagrad"


class CPULionBuilder(_Builder):
    """Of `DeepSpeedCPULion`."""

    NAME = "cpu_lion"


class FusedAdamBuilder(_FusedBuilder):
    """Of `FusedAdam`."""

    NAME = "fused_adam"


class FusedLambBuilder(_FusedBuilder):
    """Of `FusedLamb`."""

    NAME = "fused_lamb"


class FusedLionBuilder(_FusedBuilder):
    """Of `FusedLion`."""

    NAME = "fused_lion"
