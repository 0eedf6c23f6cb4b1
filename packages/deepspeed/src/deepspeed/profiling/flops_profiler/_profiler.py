"""The FLOPS profiler by the original's methods, on ds_core.profiling."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from ds_core.errors import DsError
from ds_core.profiling import FlopsProfiler as Counter
from ds_core.profiling import Profile
from ds_core.profiling.model_profile import write_report
from ds_core.profiling.report import number, seconds
from ds_core.quantities import told_bytes


class FlopsProfiler:
    """Counts the operations of a model between `start_profile` and `stop_profile`.

    Totals are of the forward, as the original's; `profile` has backward and recomputation too.

    Args:
        model: whose modules are told apart.
        ds_engine: makes no difference: parameters of a sharded model are counted whole.
        recompute_fwd_factor: makes no difference: recomputations are counted as they happen.
    """

    def __init__(
        self, model: nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0
    ) -> None:
        self.model, self.ds_engine = model, ds_engine
        self.started = False
        self._counter: Counter | None = None

    def start_profile(self, ignore_list: Sequence[type[nn.Module]] | None = None) -> None:
        """Begin anew. ignore_list: classes of modules to leave out, with what is below them."""
        self.stop_profile()
        self._counter = Counter(self.model, ignore=tuple(ignore_list or ()))
        self._counter.start()
        self.started = True

    def stop_profile(self) -> None:
        """Stop; the figures stay."""
        if self.started and self._counter is not None:
            self._counter.stop()
        self.started = False

    def end_profile(self) -> None:
        """Stop, and forget the figures."""
        self.stop_profile()
        self._counter = None

    def reset_profile(self) -> None:
        """Forget the figures; begin anew if it runs."""
        if self.started:
            self.start_profile()
        else:
            self._counter = None

    @property
    def profile(self) -> Profile:
        """All figures. Raises DsError if nothing was profiled."""
        if self._counter is None:
            raise DsError("FlopsProfiler: nothing was profiled; call start_profile() first")
        return self._counter.profile()

    def get_total_flops(self, as_string: bool = False) -> Any:
        """Floating-point operations of the forward."""
        flops = self.profile.forward_flops
        return number(flops, "FLOPs") if as_string else flops

    def get_total_macs(self, as_string: bool = False) -> Any:
        """Multiply-accumulates of the forward."""
        macs = self.profile.macs
        return number(macs, "MACs") if as_string else macs

    def get_total_duration(self, as_string: bool = False) -> Any:
        """Seconds of the forward."""
        taken = self.profile.forward_s
        return seconds(taken) if as_string else taken

    def get_total_params(self, as_string: bool = False) -> Any:
        """Parameters of the model."""
        parameters = self.profile.parameters
        return number(parameters) if as_string else parameters

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
    ) -> None:
        """Write the report to a file, or to standard output; see ds_core.profiling."""
        self._report(
            self.profile.text(
                module_depth=module_depth, top_modules=top_modules, detailed=detailed
            ),
            output_file,
        )

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        """Write the largest modules of each depth to standard output."""
        text = self.profile.text(module_depth=module_depth, top_modules=top_modules, detailed=False)
        self._report(text, None)

    def _report(self, text: str, output_file: str | None) -> None:
        if output_file is None:
            sys.stdout.write(text)
        else:
            write_report(output_file, text)


def number_to_string(num: float, units: str | None = None, precision: int = 2) -> str:
    """Such as "1.23 G"; with units "K", "M", "G" or "T" in these."""
    scales = {"T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6}
    if units is None:
        fitting = (unit for unit, scale in scales.items() if abs(num) >= scale)
        units = next(fitting, "")
    if units not in scales:
        raise DsError(f"units: got {units!r}, expected one of {', '.join(filter(None, scales))}")
    return f"{round(num / scales[units], precision):g} {units}"


def flops_to_string(flops: float, units: str | None = None, precision: int = 2) -> str:
    """Such as "1.23 GFLOPS"."""
    return f"{number_to_string(flops, units, precision)}FLOPS"


def macs_to_string(macs: float, units: str | None = None, precision: int = 2) -> str:
    """Such as "1.23 GMACs"."""
    return f"{number_to_string(macs, units, precision)}MACs"


def bytes_to_string(b: float, units: str | None = None, precision: int = 2) -> str:
    """Such as "1.23 GB", in powers of 1000; without units such as "1.15 GiB"."""
    return told_bytes(b) if units is None else f"{number_to_string(b, units, precision)}B"


def params_to_string(params_num: float, units: str | None = None, precision: int = 2) -> str:
    """Such as "1.23 G"."""
    return number_to_string(params_num, units, precision).strip()


def duration_to_string(duration: float, units: str | None = None, precision: int = 2) -> str:
    """Such as "1.23 ms"."""
    return f"{number_to_string(duration, units, precision)}s"
