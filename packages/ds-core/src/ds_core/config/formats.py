"""Which number formats a config asks for, once the device has been looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ds_core.config.sections import (
    Bf16Section,
    DataTypesSection,
    Fp16Section,
    TorchAutocastSection,
)

Format = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class LossScaling:
    """How the loss is scaled; the names of `ds_core.precision.LossScale`.

    Attributes:
        static: the scale, constant; None for one that adjusts.
        initial: first adjusted scale.
        window: steps without overflow after which it doubles.
        hysteresis: overflows at which it halves.
        consecutive_hysteresis: whether a step without overflow resets that count.
        minimum: it never falls below this.
    """

    static: float | None
    initial: float
    window: int
    hysteresis: int
    consecutive_hysteresis: bool
    minimum: float


@dataclass(frozen=True)
class NumberFormats:
    """The formats of a run, by name; None means "leave it as the model has it".

    Attributes:
        compute: of parameters and activations.
        master: of the optimizer's own copy of the parameters; None: it keeps none.
        grad: in which gradients accumulate; None: not said.
        autocast: of torch.autocast around forward; None: no autocast.
        loss_scale: None: the loss is not scaled.
        casts_inputs: whether floating-point inputs of the model are cast to `compute`.
        reason: one clause on how "auto" was decided, empty if nothing was left to decide.
    """

    compute: Format | None = None
    master: Format | None = None
    grad: Format | None = None
    autocast: Format | None = None
    loss_scale: LossScaling | None = None
    casts_inputs: bool = False
    reason: str = ""


def resolve(
    bf16: Bf16Section,
    fp16: Fp16Section,
    autocast: TorchAutocastSection,
    data_types: DataTypesSection,
    *,
    bf16_is_fast: bool,
    fp16_is_fast: bool,
) -> NumberFormats:
    """The formats that the sections ask for on such a device.

    What is switched on explicitly wins over "auto"; between two "auto", bf16 wins, because it
    needs no loss scale.
    """
    if autocast.enabled:
        return _autocast_formats(autocast, fp16, data_types)
    compute, reason = _compute_format(bf16, fp16, bf16_is_fast, fp16_is_fast)
    grad = data_types.grad_accum_dtype
    has_master = not (compute == "bf16" and bf16.bf16_master_weights_and_grads)
    if compute is None:
        # A 16-bit accumulation was asked for with 16-bit parameters, which "auto" left out.
        return NumberFormats(grad="fp32" if grad == "fp32" else None, reason=reason)
    return NumberFormats(
        compute=compute,
        master="fp32" if has_master else None,
        grad=grad if has_master else grad or "bf16",
        loss_scale=_loss_scaling(fp16) if compute == "fp16" else None,
        casts_inputs=compute == "fp16" and fp16.auto_cast,
        reason=reason,
    )


def conflicts(
    bf16: Bf16Section,
    fp16: Fp16Section,
    autocast: TorchAutocastSection,
    data_types: DataTypesSection,
) -> list[str]:
    """Combinations of the sections that no device can honour, one line each."""
    problems = []
    if bf16.enabled is True and fp16.enabled is True:
        problems.append("fp16.enabled: got true, but bf16.enabled is true as well; choose one")
    for name, section in (("bf16", bf16), ("fp16", fp16)):
        if autocast.enabled and section.enabled is True:
            problems.append(
                f"torch_autocast.enabled: got true, but {name}.enabled is true as well: autocast "
                f"keeps the parameters in fp32 and {name} does not; choose one"
            )
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if getattr(bf16, key) and (bf16.enabled is False or autocast.enabled):
            problems.append(
                f"bf16.{key}: got true, but the parameters are not bf16; set bf16.enabled to true "
                f"(without torch_autocast), or remove the key"
            )
    grad = data_types.grad_accum_dtype
    possible = {
        name for name, section in (("bf16", bf16), ("fp16", fp16)) if section.enabled is not False
    }
    if grad in ("bf16", "fp16") and (autocast.enabled or grad not in possible):
        problems.append(
            f'data_types.grad_accum_dtype: got "{grad}", which would round gradients of parameters '
            f'that are not {grad}; use "fp32", null, or enable {grad}'
        )
    return problems


def _compute_format(
    bf16: Bf16Section, fp16: Fp16Section, bf16_is_fast: bool, fp16_is_fast: bool
) -> tuple[Format | None, str]:
    if bf16.enabled is True:
        return "bf16", ""
    if fp16.enabled is True:
        return "fp16", ""
    reasons = []
    if bf16.enabled == "auto":
        if bf16_is_fast:
            return "bf16", "bf16 is on: the device computes it fast"
        reasons.append("bf16 is off: the device does not compute it fast")
    if fp16.enabled == "auto":
        if fp16_is_fast:
            return "fp16", "; ".join([*reasons, "fp16 is on: the device computes it fast"])
        reasons.append("fp16 is off: the device does not compute it fast")
    return None, "; ".join(reasons)


def _autocast_formats(
    autocast: TorchAutocastSection, fp16: Fp16Section, data_types: DataTypesSection
) -> NumberFormats:
    return NumberFormats(
        grad=data_types.grad_accum_dtype,
        autocast=autocast.dtype,
        # Activations' gradients are fp16 then, and underflow as they do with fp16 parameters.
        loss_scale=_loss_scaling(fp16) if autocast.dtype == "fp16" else None,
    )


def _loss_scaling(fp16: Fp16Section) -> LossScaling:
    return LossScaling(
        static=fp16.loss_scale or None,
        initial=2.0**fp16.initial_scale_power,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
        minimum=fp16.min_loss_scale,
    )
