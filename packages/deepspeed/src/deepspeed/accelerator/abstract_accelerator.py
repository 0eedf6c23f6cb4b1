"""An accelerator by the original's methods, over `ds_core.accelerator` and torch's own modules."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from deepspeed._errors import NotProvidedError
from deepspeed._stand_in import not_provided
from deepspeed.accelerator._host_tensors import HostTensors
from ds_core.accelerator import Accelerator

_NO_BUILDERS = "ds_ops builds its kernels itself; `ds ops report` lists them"


class DeepSpeedAccelerator(HostTensors):
    """The device of this process.

    `device_index` is that of a device of its kind, None for the current one; a CPU has one device.
    Of a CPU, memory figures are those that torch's allocator keeps, which are 0, but `total_memory`
    and `available_memory` are the machine's.

    Args:
        core: what ds-core found.
    """

    def __init__(self, core: Accelerator) -> None:
        self.core = core
        self._name = core.kind
        self._communication_backend_name = core.backend
        self._compile_backend = "inductor"

    def __repr__(self) -> str:
        return f"<accelerator {self._name}>"

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.core.kind)

    # --- What it is ---------------------------------------------------------------------------

    def is_available(self) -> bool:
        """Whether torch can compute on it."""
        return self._is_cpu or torch.accelerator.is_available()

    def is_synchronized_device(self) -> bool:
        """Whether work is done when it was asked for, as on a CPU."""
        return not self.core.has_streams

    def use_host_timers(self) -> bool:
        """Whether the clock of the host times its work."""
        return self.is_synchronized_device()

    def resolves_data_dependency(self) -> bool:
        """Whether no stream has to be waited for."""
        return self.is_synchronized_device()

    def handles_memory_backpressure(self) -> bool:
        """Whether memory in use by queued work cannot pile up."""
        return self.is_synchronized_device()

    def communication_backend_name(self) -> str:
        """The backend of torch.distributed for its tensors."""
        return self._communication_backend_name

    def is_bf16_supported(self) -> bool:
        """Whether matrix products in bfloat16 run on it."""
        return self.core.supports(torch.bfloat16)

    def is_fp16_supported(self) -> bool:
        """Whether matrix products in float16 run on it."""
        return self.core.supports(torch.float16)

    def is_fp64_supported(self) -> bool:
        """Whether matrix products in float64 run on it."""
        return self.core.supports(torch.float64)

    def supported_dtypes(self) -> list[torch.dtype]:
        """Floating-point types that models can be trained in on it."""
        wanted = (torch.float32, torch.float16, torch.bfloat16)
        return [dtype for dtype in wanted if self.core.supports(dtype)]

    def is_triton_supported(self) -> bool:
        """Whether kernels in Triton run on it."""
        if self.core.kind == "cuda":
            return bool(torch.version.hip) or torch.cuda.get_device_capability() >= (7, 0)
        return self.core.kind == "xpu"

    # --- Which one ----------------------------------------------------------------------------

    def device_name(self, device_index: int | None = None) -> str:
        """Such as "cuda:1", or "cuda" without an index; "cpu"."""
        return (
            self._name if self._is_cpu or device_index is None else f"{self._name}:{device_index}"
        )

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        """A context in which that device is the current one."""
        return nullcontext() if self._is_cpu else self._module.device(device_index)

    def set_device(self, device_index: int) -> None:
        """Make it the current one."""
        if not self._is_cpu:
            torch.accelerator.set_device_index(device_index)

    def current_device(self) -> int:
        """Index of the current one; 0 on a CPU."""
        return 0 if self._is_cpu else torch.accelerator.current_device_index()

    def current_device_name(self) -> str:
        """Such as "cuda:1"; "cpu"."""
        return self.device_name(self.current_device())

    def device_count(self) -> int:
        """Devices that this process sees."""
        return self.core.device_count()

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait until everything queued on the device is done."""
        if device_index is None:
            self.core.synchronize()
        elif not self._is_cpu:
            torch.accelerator.synchronize(device_index)

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies on a device of this kind."""
        return tensor.device.type == self.core.kind

    # --- Random numbers -----------------------------------------------------------------------

    def random(self) -> Any:
        """torch.random."""
        return torch.random

    def manual_seed(self, seed: int) -> None:
        """Seed the current device's generator."""
        if self._is_cpu:
            torch.manual_seed(seed)
        else:
            self._module.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the generators of all devices."""
        if self._is_cpu:
            torch.manual_seed(seed)
        else:
            self._module.manual_seed_all(seed)

    def initial_seed(self) -> int:
        """The seed that the current device's generator began with."""
        return int(torch.initial_seed() if self._is_cpu else self._module.initial_seed())

    def default_generator(self, device_index: int) -> torch.Generator:
        """The generator of a device."""
        if self._is_cpu:
            return torch.default_generator
        generator: torch.Generator = self._module.default_generators[device_index]
        return generator

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        """State of a device's generator."""
        if self._is_cpu or device_index is None:
            return self.core.rng_state()
        state: torch.Tensor = self._module.get_rng_state(device_index)
        return state

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        """Go on from a state that `get_rng_state` returned."""
        if self._is_cpu or device_index is None:
            self.core.set_rng_state(new_state)
        else:
            self._module.set_rng_state(new_state, device_index)

    # --- Streams and events -------------------------------------------------------------------

    @property
    def Stream(self) -> Any:  # noqa: N802 - the original's name
        """The class of streams; None on a CPU, where there are none."""
        return None if self._is_cpu else self._module.Stream

    @property
    def Event(self) -> Any:  # noqa: N802 - the original's name
        """The class of events; None on a CPU."""
        return None if self._is_cpu else self._module.Event

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """A context whose work is queued on `stream`."""
        return nullcontext() if self._is_cpu else self._module.stream(stream)

    def current_stream(self, device_index: int | None = None) -> Any:
        """The stream that work is queued on now; None on a CPU."""
        return None if self._is_cpu else self._module.current_stream(device_index)

    def default_stream(self, device_index: int | None = None) -> Any:
        """The stream that work is queued on unless another is chosen; None on a CPU."""
        return None if self._is_cpu else self._module.default_stream(device_index)

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        """Call back once the device is set up."""
        return callback() if self._is_cpu else self._module._lazy_call(callback)

    # --- Memory -------------------------------------------------------------------------------

    def empty_cache(self) -> None:
        """Give memory that torch keeps, but nobody uses, back to the device."""
        self.core.empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes in tensors."""
        return self._memory("memory_allocated", device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Most bytes in tensors so far."""
        return self._memory("max_memory_allocated", device_index)

    def memory_reserved(self, device_index: int | None = None) -> int:
        """Bytes that torch's allocator holds, in tensors and for later ones."""
        return self._memory("memory_reserved", device_index)

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        """Most bytes that torch's allocator has held."""
        return self._memory("max_memory_reserved", device_index)

    def memory_cached(self, device_index: int | None = None) -> int:
        """The same as `memory_reserved`."""
        return self.memory_reserved(device_index)

    def max_memory_cached(self, device_index: int | None = None) -> int:
        """The same as `max_memory_reserved`."""
        return self.max_memory_reserved(device_index)

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        """The figures of torch's allocator by name; none on a CPU."""
        return {} if self._is_cpu else dict(torch.accelerator.memory_stats(device_index))

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Begin the largest figures anew."""
        if not self._is_cpu:
            torch.accelerator.reset_peak_memory_stats(device_index)

    def reset_max_memory_allocated(self, device_index: int | None = None) -> None:
        """The same as `reset_peak_memory_stats`."""
        self.reset_peak_memory_stats(device_index)

    def reset_max_memory_cached(self, device_index: int | None = None) -> None:
        """The same as `reset_peak_memory_stats`."""
        self.reset_peak_memory_stats(device_index)

    def total_memory(self, device_index: int | None = None) -> int:
        """Bytes of the device; on a CPU those of the machine."""
        return self._whole(device_index)[1]

    def available_memory(self, device_index: int | None = None) -> int:
        """Bytes of it that nobody uses."""
        return self._whole(device_index)[0]

    def _memory(self, figure: str, device_index: int | None) -> int:
        return 0 if self._is_cpu else int(getattr(torch.accelerator, figure)(device_index))

    def _whole(self, device_index: int | None) -> tuple[int, int]:
        if self._is_cpu:
            page = os.sysconf("SC_PAGE_SIZE")
            return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
        free, total = torch.accelerator.get_memory_info(device_index)
        return int(free), int(total)

    # --- Ranges for profilers -----------------------------------------------------------------

    def range_push(self, msg: str, domain: str | None = None, category: str | None = None) -> None:
        """Begin a range that Nsight Systems draws; nothing without CUDA."""
        if self.core.kind == "cuda":
            torch.cuda.nvtx.range_push(msg)

    def range_pop(self, domain: str | None = None) -> None:
        """End the range begun last."""
        if self.core.kind == "cuda":
            torch.cuda.nvtx.range_pop()

    # --- Graphs -------------------------------------------------------------------------------

    def is_current_stream_capturing(self) -> bool:
        """Whether a CUDA graph is being recorded."""
        return self.core.kind == "cuda" and torch.cuda.is_current_stream_capturing()

    def create_graph(self) -> Any:
        """A CUDA graph; None on other devices."""
        return torch.cuda.CUDAGraph() if self.core.kind == "cuda" else None

    def capture_to_graph(
        self, graph: Any, pool: Any = None, stream: Any = None
    ) -> AbstractContextManager[Any]:
        """A context whose work is recorded in `graph`."""
        if self.core.kind != "cuda":
            return nullcontext()
        return torch.cuda.graph(graph, pool=pool, stream=stream)

    def replay_graph(self, graph: Any) -> None:
        """Do what `graph` has recorded."""
        if graph is not None:
            graph.replay()

    # --- Environment, compilation, building ---------------------------------------------------

    def export_envs(self) -> list[str]:
        """Beginnings of environment variables that other hosts should get."""
        return ["NCCL", "LD_LIBRARY", "PATH"] if self.core.kind == "cuda" else []

    def visible_devices_envs(self) -> list[str]:
        """Variables that choose which devices a process sees."""
        return [self.core.visible_devices_variable or "CUDA_VISIBLE_DEVICES"]

    def set_visible_devices_envs(
        self, current_env: MutableMapping[str, str], local_accelerator_ids: Iterable[int]
    ) -> None:
        """Have a process with this environment see these devices only."""
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(map(str, local_accelerator_ids))

    def get_compile_backend(self) -> str:
        """The backend of torch.compile."""
        return self._compile_backend

    def set_compile_backend(self, backend: str) -> None:
        """Choose another of `torch.compiler.list_backends()`."""
        self._compile_backend = backend

    def op_builder_dir(self) -> str:
        """Raises NotProvidedError."""
        raise NotProvidedError(f"op builders are not provided; {_NO_BUILDERS}")

    def create_op_builder(self, class_name: str) -> Any:
        """Raises NotProvidedError."""
        raise NotProvidedError(f"{class_name} is not provided; {_NO_BUILDERS}")

    def get_op_builder(self, class_name: str) -> Any:
        """A stand-in that raises NotProvidedError when used."""
        return not_provided(class_name, _NO_BUILDERS)

    def build_extension(self) -> Any:
        """torch's own command for setup.py."""
        from torch.utils.cpp_extension import BuildExtension

        return BuildExtension
