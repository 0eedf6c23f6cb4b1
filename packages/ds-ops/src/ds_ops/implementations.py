"""What ds-ops offers to ds-core's ops: one row per op and way to compute it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from ds_core.ops import library as torch_library
from ds_core.seams import Implementation
from ds_ops import _env
from ds_ops.cuda_kernels import library as cuda_library
from ds_ops.native import library, sources
from ds_ops.triton_kernels import catalog, launching, targets


@dataclass(frozen=True)
class TorchKernel:
    """How torch's own kernels compute an op.

    Attributes:
        function: "module:function" below `ds_ops.torch_kernels`.
        devices: kinds of device that it is for; empty: all.
        priority: 50 loses against our kernels, 150 wins against them; 95 loses against those in C++
            (100) and wins against those in Triton (90).
        partly: "module:function" that says of a call why it is not taken, or None; empty: all are.
    """

    function: str
    devices: tuple[str, ...] = ()
    priority: int = 50
    partly: str = ""


_BOTH = ("cpu", "cuda")

#: Ops that torch computes as well as we could, or that only it computes somewhere.
TORCH: Mapping[str, TorchKernel] = MappingProxyType(
    {
        "linear_cross_entropy": TorchKernel("linear_cross_entropy:linear_cross_entropy"),
        "paged_attention": TorchKernel(
            "paged_attention:paged_attention", ("cuda",), 150, "paged_attention:partly"
        ),
        "sample_tokens": TorchKernel("sample_tokens:sample_tokens", ("cpu",)),
        "rope_write_kv_cache_": TorchKernel("rope_write_kv_cache:rope_write_kv_cache_", ("cpu",)),
        "sparse_attention": TorchKernel(
            "sparse_attention:sparse_attention",
            ("cpu", "cuda"),
            partly="sparse_attention:partly",
        ),
        "sparse_attention_backward": TorchKernel(
            "sparse_attention:sparse_attention_backward",
            ("cpu", "cuda"),
            partly="sparse_attention:partly",
        ),
        **{
            f"{name}_step_": TorchKernel(
                f"optimizer_steps:{name}_step_", ("cuda",), 50, f"optimizer_steps:{name}_refusal"
            )
            for name in ("adam", "adagrad", "sgd")
        },
        "grouped_mm": TorchKernel("grouped_mm:grouped_mm", _BOTH, 95, "grouped_mm:partly"),
        "grouped_mm_backward": TorchKernel(
            "grouped_mm:grouped_mm_backward", _BOTH, 95, "grouped_mm:partly"
        ),
        "grouped_mm_fp8": TorchKernel("fp8:grouped_mm_fp8", _BOTH, 95, "fp8:grouped_partly"),
        "scaled_mm": TorchKernel("fp8:scaled_mm", _BOTH, 95, "fp8:scaled_partly"),
        "fake_quantize": TorchKernel(
            "fake_quantize:fake_quantize", ("cpu",), partly="fake_quantize:why_not"
        ),
        "bias_activation": TorchKernel("bias_activation:bias_activation"),
        "bias_activation_backward": TorchKernel("bias_activation:bias_activation_backward"),
        "nhwc_bias_add": TorchKernel("nhwc_bias_add:nhwc_bias_add"),
        "evoformer_attention": TorchKernel("evoformer_attention:evoformer_attention"),
        "evoformer_attention_backward": TorchKernel(
            "evoformer_attention:evoformer_attention_backward"
        ),
        "attention": TorchKernel("attention:attention", _BOTH, 95, "attention:not_taken"),
        "attention_backward": TorchKernel(
            "attention:attention_backward", _BOTH, 95, "attention:backward_not_taken"
        ),
    }
)


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

    def partly(self) -> Callable[..., str | None] | None:
        """Always None."""
        return None

    def traced(self) -> Callable[..., Any] | None:
        """Always None."""
        return None

    def bind(self, namespace: str, device_type: str) -> None:
        """Register the kernel, building the library first."""
        library.bind(self.op, namespace, "CPU")


class Cuda:
    """A kernel of the CUDA library; Triton's is preferred, until a measurement says otherwise."""

    name = "cuda"
    priority = 80
    devices: tuple[str, ...] = ("cuda",)

    def __init__(self, op: str) -> None:
        self.op = op

    def unavailable(self, device_type: str) -> str | None:
        """Why it cannot run there; builds nothing."""
        return cuda_library.unavailable(device_type)

    def state(self, device_type: str) -> str:
        """Either "prebuilt", "cached" or "will build"."""
        return cuda_library.state()

    def partly(self) -> Callable[..., str | None] | None:
        """Always None."""
        return None

    def traced(self) -> Callable[..., Any] | None:
        """Always None."""
        return None

    def bind(self, namespace: str, device_type: str) -> None:
        """Register the kernel, building the library first."""
        cuda_library.bind(self.op, namespace, "CUDA")


class Torch:
    """A call of torch's own kernel, imported when it is bound."""

    name = "torch"

    def __init__(self, op: str, kernel: TorchKernel) -> None:
        self.op, self._kernel = op, kernel
        self.priority, self.devices = kernel.priority, kernel.devices

    def unavailable(self, device_type: str) -> str | None:
        """Always None: it runs wherever it is meant to."""
        return None

    def state(self, device_type: str) -> str:
        """Always "python": nothing is built."""
        return "python"

    def partly(self) -> Callable[..., str | None] | None:
        """What its row names."""
        return self._refusal

    @cached_property
    def _refusal(self) -> Callable[..., str | None] | None:
        return _function("torch_kernels", self._kernel.partly) if self._kernel.partly else None

    def traced(self) -> Callable[..., Any] | None:
        """Always None."""
        return None

    def bind(self, namespace: str, device_type: str) -> None:
        """Register the kernel."""
        kernel = _function("torch_kernels", self._kernel.function)
        torch_library.bind_python(self.op, namespace, device_type, kernel)


class Triton:
    """A kernel in Triton, imported when it is bound and compiled for the shapes that it meets.

    With TRITON_INTERPRET=1 it is for CPU tensors, and slow: only computed by where it is named.
    """

    name = "triton"

    def __init__(self, op: str) -> None:
        self.op = op
        interprets = _env.triton_interprets()
        self.priority = 1 if interprets else 90
        self.devices: tuple[str, ...] = ("cpu",) if interprets else ("cuda",)

    def unavailable(self, device_type: str) -> str | None:
        """Why it cannot run there; imports and compiles nothing."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'ds-ops[triton]'"
        return targets.unavailable(device_type)

    def state(self, device_type: str) -> str:
        """Always "jit": Triton keeps what it compiled in a cache of its own."""
        return "jit"

    def partly(self) -> Callable[..., str | None] | None:
        """As `catalog.PARTLY` says; a call that no config covers is an error that names those."""
        where = catalog.PARTLY.get(self.op)
        return _function("triton_kernels", where) if where else None

    def traced(self) -> Callable[..., Any] | None:
        """The kernel, which launches are part of a graph in."""
        return None if _env.triton_interprets() else launching.traced(self._function())

    def bind(self, namespace: str, device_type: str) -> None:
        """Register the kernel."""
        torch_library.bind_python(self.op, namespace, device_type, self._function())

    def _function(self) -> Callable[..., Any]:
        return _function("triton_kernels", catalog.OPS[self.op])


def _function(package: str, where: str) -> Callable[..., Any]:
    """What "module:function" names in a package of ds_ops."""
    module, _, function = where.partition(":")
    found: Callable[..., Any] = getattr(
        importlib.import_module(f"ds_ops.{package}.{module}"), function
    )
    return found


def implementations() -> list[Implementation]:
    """Every implementation of ds-ops. Builds and imports nothing."""
    found: list[Implementation] = [Cpp(op) for op in sources.ops()]
    found += [Torch(op, kernel) for op, kernel in TORCH.items()]
    found += [Triton(op) for op in catalog.OPS]
    found += [Cuda(op) for op in cuda_library.ops()]
    return found
