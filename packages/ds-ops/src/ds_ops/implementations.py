"""What ds-ops offers to ds-core's ops: one row per op and way to compute it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from ds_core.ops import library as torch_library
from ds_core.seams import Implementation
from ds_ops import _env
from ds_ops.native import library, sources
from ds_ops.triton_kernels import catalog, launching, targets

#: Ops that torch computes as well as we could: kernel by name, as "module:function" below
#: `ds_ops.torch_kernels`, and the kinds of device that it runs on (empty: all).
TORCH: dict[str, tuple[str, tuple[str, ...]]] = {
    "linear_cross_entropy": ("linear_cross_entropy:linear_cross_entropy", ()),
    "evoformer_attention": ("evoformer_attention:evoformer_attention", ()),
    "evoformer_attention_backward": ("evoformer_attention:evoformer_attention_backward", ()),
    "grouped_mm": ("grouped_mm:grouped_mm", ("cpu",)),
    "grouped_mm_backward": ("grouped_mm:grouped_mm_backward", ("cpu",)),
}


class Cpp:
    """A kernel of the C++ library."""

    name = "cpp"
    priority = 100
    devices: tuple[str, ...] = ("cpu",)

    def __init__(self, op: str) -> None:
        self.op = op

    def unavailable(self, device_type: str) -> str | None:
        """Why it cannot run there; builds nothing."""
        return library.unavailable()

    def state(self, device_type: str) -> str:
        """Either "prebuilt", "cached" or "will build"."""
        return library.state()

    def traced(self) -> Callable[..., Any] | None:
        """Always None."""
        return None

    def bind(self, namespace: str, device_type: str) -> None:
        """Register the kernel, building the library first."""
        library.bind(self.op, namespace, "CPU")


class Torch:
    """A call of torch's own kernel, imported when it is bound."""

    name = "torch"

    def __init__(self, op: str, kernel: str, devices: tuple[str, ...], priority: int = 50) -> None:
        self.op, self.priority = op, priority
        self.devices, self._kernel = devices, kernel

    def unavailable(self, device_type: str) -> str | None:
        """Always None: it runs wherever it is meant to."""
        return None

    def state(self, device_type: str) -> str:
        """Always "python": nothing is built."""
        return "python"

    def traced(self) -> Callable[..., Any] | None:
        """Always None."""
        return None

    def bind(self, namespace: str, device_type: str) -> None:
        """Register the kernel."""
        module, _, function = self._kernel.partition(":")
        found = getattr(importlib.import_module(f"ds_ops.torch_kernels.{module}"), function)
        kernel: Callable[..., Any] = found
        torch_library.bind_python(self.op, namespace, device_type, kernel)


class Triton:
    """A kernel in Triton, imported when it is bound and compiled for the shapes that it meets.

    With TRITON_INTERPRET=1 it is for CPU tensors, and slow: only computed by where it is named.
    """

    name = "triton"

    def __init__(self, op: str) -> None:
        self.op = op
        interprets = _env.triton_interprets()
        self.priority = 1 if interprets else 100
        self.devices: tuple[str, ...] = ("cpu",) if interprets else ("cuda",)

    def unavailable(self, device_type: str) -> str | None:
        """Why it cannot run there; imports and compiles nothing."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'ds-ops[triton]'"
        return targets.unavailable(device_type)

    def state(self, device_type: str) -> str:
        """Always "jit": Triton keeps what it compiled in a cache of its own."""
        return "jit"

    def traced(self) -> Callable[..., Any] | None:
        """The kernel, which launches are part of a graph in."""
        return None if _env.triton_interprets() else launching.traced(self._function())

    def bind(self, namespace: str, device_type: str) -> None:
        """Register the kernel."""
        torch_library.bind_python(self.op, namespace, device_type, self._function())

    def _function(self) -> Callable[..., Any]:
        module, _, function = catalog.OPS[self.op].partition(":")
        found = getattr(importlib.import_module(f"ds_ops.triton_kernels.{module}"), function)
        kernel: Callable[..., Any] = found
        return kernel


def implementations() -> list[Implementation]:
    """Every implementation of ds-ops. Builds and imports nothing."""
    found: list[Implementation] = [Cpp(op) for op in sources.ops()]
    found += [Torch(op, kernel, devices) for op, (kernel, devices) in TORCH.items()]
    found += [Triton(op) for op in catalog.OPS]
    return found
