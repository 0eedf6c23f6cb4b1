"""Models built sharded, and full parameters for a while: `ds_zero.Init`, `GatheredParameters`.

The names that begin with `_orig_torch_`, `zero_wrapper_for_fp_tensor_constructor` and
`get_accelerator` are where libraries replace them: `Init` looks them up here when it is entered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import ds_zero
from deepspeed._names import names_of
from deepspeed._parameter_attributes import (
    ZeroParamStatus,
    ZeroParamType,
    give_external_parameters,
    mark_parameter,
)
from deepspeed.runtime.zero._building import BuildFormat, checked_world, refuse_arguments
from deepspeed.runtime.zero.utils import is_zero_param
from ds_core import accelerator, comm
from ds_zero import ShardError

if TYPE_CHECKING:
    import os

__all__ = [
    "DEFAULT_TENSOR_OVERRIDES",
    "DeepSpeedTensorOverride",
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "ZeroParamType",
    "is_zero_param",
    "register_external_parameter",
    "restore_init_context",
    "shutdown_init_context",
    "unregister_external_parameter",
    "zero_wrapper_for_fp_tensor_constructor",
]

__getattr__, __dir__ = names_of(
    __name__, {"get_accelerator": "deepspeed.accelerator:get_accelerator"}
)


class DeepSpeedTensorOverride(Enum):
    """What `Init` decides for tensors that are made under it."""

    dtype = 1
    device = 2


DEFAULT_TENSOR_OVERRIDES = [DeepSpeedTensorOverride.dtype, DeepSpeedTensorOverride.device]

_orig_torch_tensor = torch.tensor
_orig_torch_empty = torch.empty
_orig_torch_zeros = torch.zeros
_orig_torch_ones = torch.ones
_orig_torch_full = torch.full
_orig_torch_arange = torch.arange
_orig_torch_eye = torch.eye
_orig_torch_randn = torch.randn
_CONSTRUCTORS = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn")


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., torch.Tensor],
    target_fp_dtype: torch.dtype | None,
    target_device: torch.device | None,
) -> Callable[..., torch.Tensor]:
    """`fn`, whose tensors are on `target_device` unless told where, floating ones in the dtype."""

    @functools.wraps(fn)
    def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
        if target_device is not None and kwargs.get("device") is None:
            kwargs["device"] = target_device
        made = fn(*args, **kwargs)
        if target_fp_dtype is not None and made.is_floating_point():
            made.data = made.data.to(target_fp_dtype)
        return made

    return construct


def _tensor_class_constructor(
    dtype: torch.dtype | None, device: torch.device | None
) -> Callable[..., Any]:
    """What `torch.Tensor(...)` does: an uninitialised tensor of a shape, or one of numbers."""
    plain = torch.Tensor.__new__

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is not torch.Tensor or kwargs:
            return plain(cls, *args, **kwargs)
        made = plain(cls, *args)
        wanted = dtype if made.is_floating_point() else None
        return made.to(device=device, dtype=wanted)

    return new


class _Building(ds_zero.Init):
    """`ds_zero.Init` that gives each parameter the attributes which programs read."""

    def taken(self, param: nn.Parameter) -> None:
        """See `ds_zero.Init`."""
        mark_parameter(param)


class Init:
    """Context manager under which a model is built sharded: `ds_zero.Init` with these arguments.

    Values are those of rank 0. Tensors made inside are of the format that the configuration asks
    for, on this rank's device.

    Args:
        module: a model that is built already, to shard now.
        data_parallel_group: torch process group to shard over; default: all ranks.
        remote_device: "cpu" or "nvme": parts wait in host memory until `deepspeed.initialize` puts
            them where the configuration says. `offload_param.device` decides before it.
        config_dict_or_path, config: the DeepSpeed configuration, as mapping or JSON file.
        enabled: if False, do nothing.
        dtype: torch.half, torch.bfloat16 or torch.float; default: that of the configuration, and
            without one the device's 16-bit format.
        tensor_overrides: what is decided for tensors made inside.
        mem_efficient_linear, pin_memory, mpu: make no difference.
        zero_param_parallel_group, zero_quantized_weights, zero_quantized_nontrainable_weights,
            param_swapper: refused.

    Collective. Raises ShardError for what is refused, and where the launcher started several ranks
    but the process group has one.
    """

    _entered: ClassVar[list[Init]] = []

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
        tensor_overrides: Sequence[DeepSpeedTensorOverride] = tuple(DEFAULT_TENSOR_OVERRIDES),
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        refuse_arguments(
            zero_param_parallel_group=zero_param_parallel_group,
            zero_quantized_weights=zero_quantized_weights,
            zero_quantized_nontrainable_weights=zero_quantized_nontrainable_weights,
            param_swapper=param_swapper,
        )
        if data_parallel_group is not None and sequence_data_parallel_group is not None:
            raise ShardError(
                "zero.Init: got data_parallel_group and sequence_data_parallel_group, which are "
                "the same thing; give one"
            )
        given = config if config_dict_or_path is None else config_dict_or_path
        chosen = BuildFormat.of(given, dtype, remote_device)
        group = data_parallel_group or sequence_data_parallel_group
        self.dtype = chosen.dtype
        self.local_device = accelerator.current().device()
        self.remote_device = chosen.remote_device
        decided = DeepSpeedTensorOverride.dtype in tensor_overrides
        self._target_dtype = chosen.dtype if decided else None
        decided = DeepSpeedTensorOverride.device in tensor_overrides
        self._target_device = self.local_device if decided else None
        self._building = _Building(
            mesh=_mesh_of(group),
            dtype=self._target_dtype,
            device=self.local_device,
            on_host=chosen.remote_device != "none",
            from_rank0=True,
        )
        self._before: dict[str, Any] = {}
        if module is not None:
            self._building.adopt(module)

    def __enter__(self) -> Init:
        if self.enabled:
            if not Init._entered:
                self._building.__enter__()
                self.wrap_constructors()
            Init._entered.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.enabled:
            return
        Init._entered.pop()
        if not Init._entered:
            self.unwrap_constructors()
            self._building.__exit__(kind, error, trace)

    def shut_down(self) -> None:
        """See `shutdown_init_context`; again it does nothing."""
        if self._before:
            self.unwrap_constructors()
            self._building.pause()

    def restore(self) -> None:
        """See `restore_init_context`; nothing unless it is shut down."""
        if not self._before:
            self._building.resume()
            self.wrap_constructors()

    def wrap_constructors(self) -> None:
        """Let torch's constructors make tensors of this format; nothing if they do."""
        if self._before:
            return
        for name in _CONSTRUCTORS:
            self._before[name] = getattr(torch, name)
            made = zero_wrapper_for_fp_tensor_constructor(
                globals()[f"_orig_torch_{name}"],
                target_fp_dtype=self._target_dtype,
                target_device=self._target_device,
            )
            setattr(torch, name, made)
        new = _tensor_class_constructor(self._target_dtype, self._target_device)
        torch.Tensor.__new__ = new  # type: ignore[method-assign]

    def unwrap_constructors(self) -> None:
        """Give torch its constructors back."""
        if not self._before:
            return
        for name, plain in self._before.items():
            setattr(torch, name, plain)
        self._before.clear()
        del torch.Tensor.__new__


def _mesh_of(group: Any) -> comm.Mesh | None:
    """The ranks of a torch process group along "dp"; None: all of them."""
    checked_world(group)
    if group is None:
        return None
    device = accelerator.current().kind
    return comm.Mesh(DeviceMesh.from_group(group, device, mesh_dim_names=("dp",)))


def shutdown_init_context() -> None:
    """Leave an `Init` that is entered without effect for a while; what is built so far is sharded.

    `deepspeed.initialize` does so itself. Collective inside an `Init`, as all of it is.
    """
    for entered in Init._entered[:1]:
        entered.shut_down()


def restore_init_context() -> None:
    """Undo `shutdown_init_context`."""
    for entered in Init._entered[:1]:
        entered.restore()


class GatheredParameters:
    """`ds_zero.GatheredParameters` for the sharded ones among `params`; others are left alone.

    Args:
        params: a parameter or any iterable of them; what is no parameter is passed over.
        modifier_rank: rank whose edits are kept; None: edits are lost.
        fwd_module: a module that uses them in its forward; see `register_external_parameter`.
        enabled: if False, do nothing.

    Collective.
    """

    def __init__(
        self,
        params: nn.Parameter | Iterable[nn.Parameter],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        several = isinstance(params, Iterable) and not isinstance(params, torch.Tensor)
        given: Iterable[Any] = params if several else [params]
        self.params = [param for param in given if is_zero_param(param)] if enabled else []
        self.enabled = bool(self.params)
        for param in self.params if fwd_module is not None else ():
            assert fwd_module is not None
            register_external_parameter(fwd_module, param)
        self._held = ds_zero.GatheredParameters(self.params, modifier_rank, enabled=self.enabled)

    def __enter__(self) -> None:
        self._held.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.__exit__(kind, error, trace)


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Note that the forward of `module` uses a parameter of another module.

    That works without: a parameter that is used where no hook foresaw it is gathered there.
    """
    if not isinstance(parameter, nn.Parameter):
        raise ShardError(
            f"register_external_parameter: got {type(parameter).__name__}, expected a Parameter"
        )
    give_external_parameters(module)
    module.__dict__["_external_params"][id(parameter)] = parameter


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Undo `register_external_parameter`. Raises ShardError if it is not registered."""
    known = module.__dict__.get("_external_params", {})
    if id(parameter) not in known:
        raise ShardError(
            f"unregister_external_parameter: the parameter is not one of the {len(known)} that "
            f"were registered with this {type(module).__name__}"
        )
    del known[id(parameter)]
