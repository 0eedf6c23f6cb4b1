"""What the optimizers share: a step that takes each parameter through one kernel, and its undo."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ds_core.errors import OptimizerError
from ds_core.ops.step_undo import step_undo_

#: Formats of parameters and gradients.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: Multiplies a count of steps before the position of a parameter is added: odd, for 64 bits.
_SEED_STRIDE = 0x9E3779B97F4A7C15


@dataclass
class _Undo:
    """What takes back the last step of one parameter."""

    states: list[torch.Tensor]
    step: float
    buffer: torch.Tensor
    copy: torch.Tensor | None
    was_new: bool


@dataclass(frozen=True)
class Update:
    """One parameter's part of a step, all tensors contiguous and in one shape.

    Attributes:
        param, grad, states: what the kernel reads and writes; states in the order of `state_keys`.
        step: counts this one, from 1.
        options: arguments that kernels take by these names: copy, grad_scale, found_inf; undo and
            seed, where the optimizer has them.
    """

    param: torch.Tensor
    grad: torch.Tensor
    states: list[torch.Tensor]
    step: int
    options: dict[str, Any]


@dataclass
class Request:
    """What a caller asks of one step."""

    gradients: Mapping[torch.Tensor, torch.Tensor]
    copies: Mapping[torch.Tensor, torch.Tensor]
    grad_scale: torch.Tensor | float | None
    undo: bool
    found_inf: torch.Tensor | None = None
    _known: dict[tuple[str, torch.device], torch.Tensor] = field(default_factory=dict)

    def scalars_for(self, param: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """The factor on gradients and the flag that leaves a step out, as kernels take them."""
        given = {"grad_scale": self.grad_scale, "found_inf": self.found_inf}
        return {name: self._scalar(name, value, param) for name, value in given.items()}

    def _scalar(
        self, name: str, value: torch.Tensor | float | None, param: torch.Tensor
    ) -> torch.Tensor | None:
        if value is None:
            return None
        found = self._known.get((name, param.device))
        if found is None:
            if not isinstance(value, torch.Tensor):
                value = param.new_full((), value, dtype=torch.float32)
            elif value.device != param.device:
                value = value.to(param.device)
            found = value.detach().to(torch.float32).reshape(())
            self._known[name, param.device] = found
        return found


class FusedOptimizer(Optimizer, ABC):
    """Base: parameters go one by one through a kernel, which `_update` calls.

    Subclasses set `state_keys` (tensors with a number for each of the parameter's), `ops` (the
    kernels' names), `devices` (kinds that parameters may be on; empty: all) and `_update`.
    `step_options` says which arguments `step` takes, for callers
    that fuse more into it than `torch.optim` has words for.
    """

    ops: ClassVar[tuple[str, ...]]
    devices: ClassVar[tuple[str, ...]] = ()
    state_keys: ClassVar[tuple[str, ...]] = ()
    step_options: ClassVar[frozenset[str]] = frozenset(
        {"gradients", "copies", "grad_scale", "found_inf"}
    )
    #: `torch.amp.GradScaler` then leaves unscaling, and leaving out a step, to `step`.
    _step_supports_amp_scaling = True

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], set_grad_none: bool = True
    ) -> None:
        self.set_grad_none = set_grad_none
        self._forget_steps()
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "set_grad_none": self.set_grad_none}

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """As torch's; `set_grad_none` of the constructor is the default."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_steps()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            self._check_group(group)
        self._number_new()

    def __copy__(self) -> Self:
        """A second handle: the same groups, states and places; what it undoes is its own."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._undos = {}
        return twin

    def _forget_steps(self) -> None:
        self._undos: dict[torch.Tensor, _Undo] = {}
        self._positions: dict[torch.Tensor, int] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises OptimizerError for a parameter that no kernel takes."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                self._check_param(param)
            self._check_group(group)
        except OptimizerError:
            self.param_groups.pop()
            raise
        self._number_new()

    def _number_new(self) -> None:
        """Number parameters that have no number yet, in the order of their groups."""
        for group in self.param_groups:
            for param in group["params"]:
                self._positions.setdefault(param, len(self._positions))

    def number_parameters(self, numbers: Mapping[torch.Tensor, int]) -> None:
        """Tell parameters apart by these numbers where rounding is random.

        By default a parameter has its place among those of all groups.
        """
        known = {**self._positions, **numbers}
        current = [param for group in self.param_groups for param in group["params"]]
        self._positions = {param: known[param] for param in current if param in known}

    def _check_param(self, param: torch.Tensor) -> None:
        name = type(self).__name__
        if param.dtype not in _FLOATS:
            raise OptimizerError(
                f"{name}: params: got {param.dtype}, expected torch.float32, torch.bfloat16 or "
                f"torch.float16; torch.optim has optimizers for others"
            )
        if param.layout is not torch.strided:
            raise OptimizerError(f"{name}: params: got {param.layout}, expected torch.strided")

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise OptimizerError for settings that no kernel has."""
        if group.get("amsgrad"):
            raise OptimizerError(
                f"{type(self).__name__}: amsgrad: got True, which it has not; "
                f"use torch.optim.AdamW(amsgrad=True)"
            )

    # ------------------------------------------------------------------ step

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        gradients: Mapping[torch.Tensor, torch.Tensor] | None = None,
        copies: Mapping[torch.Tensor, torch.Tensor] | None = None,
        grad_scale: torch.Tensor | float | None = None,
        undo: bool = False,
        found_inf: torch.Tensor | None = None,
    ) -> Any:
        """Update the parameters that have a gradient; returns what `closure` returned.

        Args:
            closure: computes the loss and the gradients anew.
            gradients: by parameter, used in place of `.grad`, in any float format.
            copies: by parameter, tensors that receive its new value, rounded: the low-precision
                weights that a model computes with, written in the same pass.
            grad_scale: one number that gradients are multiplied by.
            undo: keep what `rollback` needs, as many bytes as parameters and states have. Steps
                over different parameters are taken back together.
            found_inf: one number on the device of the parameters: if it is not 0, parameters,
                states and copies stay as they are, and no host waits to know. Steps are counted on.

        Raises OptimizerError for a gradient that is sparse, or does not fit its parameter.
        """
        if undo and "undo" not in self.step_options:
            raise OptimizerError(f"{type(self).__name__}.step: undo: got True, which it has not")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skipped, scale, flag = self._amp(grad_scale)
        if not skipped:
            found_inf = flag if found_inf is None else found_inf
            request = Request(gradients or {}, copies or {}, scale, undo, found_inf)
            for group in self.param_groups:
                self._step_group(group, request)
        return loss

    def _amp(
        self, scale: torch.Tensor | float | None
    ) -> tuple[bool, torch.Tensor | float | None, torch.Tensor | None]:
        """(whether to leave the step out, factor, flag) as `torch.amp.GradScaler`'s attributes say.

        A flag is left to the kernels if no group counts its steps: else the host has to know.
        """
        found_inf = getattr(self, "found_inf", None)
        divisor = getattr(self, "grad_scale", None)
        if divisor is not None:
            scale = divisor.reciprocal() if scale is None else scale / divisor
        if found_inf is None or self.counts_steps:
            return found_inf is not None and float(found_inf) > 0, scale, None
        return False, scale, found_inf

    def _step_group(self, group: dict[str, Any], request: Request) -> None:
        for param in group["params"]:
            grad = request.gradients.get(param, param.grad)
            if grad is not None:
                self._step_param(group, param, grad, request)

    def _step_param(
        self, group: dict[str, Any], param: torch.Tensor, grad: torch.Tensor, request: Request
    ) -> None:
        self._check_gradient(param, grad)
        was_new = self._ensure_state(group, param)
        state = self.state[param]
        step = float(state.get("step", 0)) + 1
        states = self._states(param)
        own = _own_copy(param, request.copies.get(param))
        buffer = None
        self._undos.pop(param, None)
        if request.undo:
            size = sum(t.nbytes for t in (param, *states))
            buffer = param.new_empty(size, dtype=torch.uint8)
        options: dict[str, Any] = {
            "copy": None if own is None else flat(own),
            **request.scalars_for(param),
        }
        if "undo" in self.step_options:
            options["undo"] = buffer
        if "stochastic_rounding" in group:
            options["seed"] = self._seed(group, param, int(step))
        self._update(
            group,
            Update(
                flat(param),
                flat(_like_param(grad, param)),
                [flat(t) for t in states],
                int(step),
                options,
            ),
        )
        if "step" in state:
            state["step"].fill_(step)
        if param in request.copies and own is not request.copies[param]:
            request.copies[param].copy_(param)
        if buffer is not None:
            record = _Undo(states, step - 1, buffer, request.copies.get(param), was_new)
            self._undos[param] = record

    @abstractmethod
    def _update(self, group: dict[str, Any], update: Update) -> None:
        """Call the kernel for one parameter."""

    def _check_gradient(self, param: torch.Tensor, grad: torch.Tensor) -> None:
        name = type(self).__name__
        if grad.layout is not torch.strided:
            raise OptimizerError(
                f"{name}: got a sparse gradient; make the embedding with sparse=False, or use "
                f"torch.optim.SparseAdam"
            )
        if grad.shape != param.shape or grad.device != param.device or grad.dtype not in _FLOATS:
            raise OptimizerError(
                f"{name}: got a gradient of {grad.dtype}, shape {list(grad.shape)} on "
                f"{grad.device}, expected a float of shape {list(param.shape)} on {param.device}"
            )

    def _seed(self, group: dict[str, Any], param: torch.Tensor, step: int) -> int | None:
        """What random rounding depends on: the step, and the parameter's number."""
        if not group["stochastic_rounding"]:
            return None
        position = self._positions.setdefault(param, len(self._positions))
        # The dispatcher takes signed 64 bits.
        return (step * _SEED_STRIDE + position) % 2**63

    # ------------------------------------------------------------------ undo

    @property
    def can_roll_back(self) -> bool:
        """Whether a step was taken that `rollback` takes back."""
        return bool(self._undos)

    @torch.no_grad()
    def rollback(self) -> None:
        """Take back the last step of every parameter that was stepped with `undo=True`, exactly.

        Parameters, states and copies have their bytes of before (a copy is rounded to nearest from
        its parameter). Raises OptimizerError if there is nothing to take back.
        """
        if not self._undos:
            raise OptimizerError(
                f"{type(self).__name__}.rollback: the last step kept nothing; "
                f"call step(undo=True), and roll back once"
            )
        for param, record in self._undos.items():
            copy = _own_copy(param, record.copy)
            states = [flat(t) for t in record.states]
            flat_copy = None if copy is None else flat(copy)
            step_undo_(flat(param), states, record.buffer, flat_copy)
            if record.copy is not None and copy is not record.copy:
                record.copy.copy_(param)
            if record.was_new:
                del self.state[param]
            elif "step" in self.state[param]:
                self.state[param]["step"].fill_(record.step)
        self._undos = {}

    # ------------------------------------------------------------------ state

    def _ensure_state(self, group: dict[str, Any], param: torch.Tensor) -> bool:
        """Give a parameter the state of its first step; whether it had none."""
        state = self.state[param]
        if state:
            # Some of torch's keep no count: there was at least one step.
            if "step" not in state and self._counts_steps(group):
                state["step"] = torch.ones((), dtype=torch.float32)
            return False
        state.update(self._new_state(group, param))
        return True

    def _new_state(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, torch.Tensor]:
        """A count of steps, and zeros for each of `state_keys`."""
        dtype = self._state_dtype(group)
        zeros = {key: torch.zeros_like(param, dtype=dtype) for key in self.state_keys}
        if not self._counts_steps(group):
            return zeros
        return {"step": torch.zeros((), dtype=torch.float32), **zeros}

    @property
    def counts_steps(self) -> bool:
        """Whether the host counts steps of some parameter."""
        return any(self._counts_steps(group) for group in self.param_groups)

    def _counts_steps(self, group: dict[str, Any]) -> bool:
        """Whether a state holds a count of steps."""
        return True

    def _states(self, param: torch.Tensor) -> list[torch.Tensor]:
        """What the kernel updates beside the parameter."""
        state = self.state[param]
        keys = [key for key in self.state_keys if state.get(key) is not None]
        return [self._laid_out(state, key, param) for key in keys]

    @staticmethod
    def _state_dtype(group: dict[str, Any]) -> torch.dtype:
        return torch.float32 if group.get("fp32_optimizer_states", True) else torch.bfloat16

    def _laid_out(self, state: dict[str, Any], key: str, param: torch.Tensor) -> torch.Tensor:
        """A state whose elements lie in memory as the parameter's do."""
        found: torch.Tensor = state[key]
        if found.shape != param.shape:
            raise OptimizerError(
                f"{type(self).__name__}: state {key!r}: got shape {list(found.shape)}, expected "
                f"{list(param.shape)}"
            )
        if found.stride() != param.stride() and not found.is_contiguous():
            state[key] = found = _like_param(found, param)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but a state keeps its format whatever the parameter's is.

        Raises OptimizerError for settings that it has not, and is then as it was.
        """
        for group in state_dict["param_groups"]:
            self._check_group({**self.defaults, **group})
        super().load_state_dict(state_dict)
        pairs = zip(state_dict["param_groups"], self.param_groups, strict=True)
        self.keep_formats(state_dict["state"], pairs)

    def keep_formats(
        self,
        saved_state: dict[Any, dict[str, Any]],
        groups: Iterable[tuple[dict[str, Any], dict[str, Any]]],
    ) -> None:
        """Take loaded states over in formats of their own: torch casts them to the parameters'.

        Args:
            saved_state: of a state dict.
            groups: a group of the same state dict, and the one that it was loaded into.
        """
        for saved_group, group in groups:
            for key, param in zip(saved_group["params"], group["params"], strict=True):
                saved = saved_state.get(key, {})
                own = self.state[param] if saved else {}
                for name in own.keys() - {*self._new_state_keys(), *saved}:
                    del own[name]
                for name, value in saved.items():
                    if torch.is_tensor(value):
                        own[name] = self._adopted(group, param, name, value)

    def _new_state_keys(self) -> tuple[str, ...]:
        return ("step", *self.state_keys)

    def _adopted(
        self, group: dict[str, Any], param: torch.Tensor, key: str, value: torch.Tensor
    ) -> torch.Tensor:
        if key == "step":
            return value.detach().to("cpu", torch.float32, copy=True)
        if key not in self.state_keys or not value.is_floating_point():
            return value.detach().to(param.device, copy=True)
        adopted = torch.empty_like(param, dtype=self._state_dtype(group))
        return adopted.copy_(value)


def flat(t: torch.Tensor) -> torch.Tensor:
    """`t` as its elements lie in memory, contiguous; it is dense."""
    return t if t.is_contiguous() else t.detach().as_strided((t.numel(),), (1,))


def is_dense(t: torch.Tensor) -> bool:
    """Whether the elements fill one range of memory, in whatever order."""
    return t.is_contiguous() or torch.empty_like(t, device="meta").stride() == t.stride()


def _like_param(t: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """`t`, or an equal tensor, whose elements lie in memory as the parameter's do."""
    if not is_dense(param):
        raise OptimizerError(
            f"params: got one of shape {list(param.shape)} with strides {list(param.stride())}, "
            f"whose elements have gaps between them or overlap; expected a dense one"
        )
    if t.stride() == param.stride() or (t.is_contiguous() and param.is_contiguous()):
        return t
    return torch.empty_like(param, dtype=t.dtype).copy_(t)


def _own_copy(param: torch.Tensor, copy: torch.Tensor | None) -> torch.Tensor | None:
    """The copy that a kernel can write, or None; checked."""
    if copy is None:
        return None
    if copy.shape != param.shape or copy.device != param.device or copy.dtype not in _FLOATS:
        raise OptimizerError(
            f"copies: got {copy.dtype}, shape {list(copy.shape)} on {copy.device}, expected a "
            f"float of shape {list(param.shape)} on {param.device}"
        )
    same = copy.stride() == param.stride() or (copy.is_contiguous() and param.is_contiguous())
    return copy if same else None
