"""The curvature of each block of a model, measured now and then while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_core import comm
from ds_core.blocks import repeated_stacks
from ds_core.curvature.hessian import Hessian, twice_differentiable
from ds_core.curvature.power_iteration import top_eigenvalue
from ds_core.curvature.section import EigenvalueSection
from ds_core.errors import ConfigError, DsError
from ds_core.seams import Event, EventKind
from ds_core.seams.runner import loss_of

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.engine import Engine

logger = logging.getLogger(__name__)


class EigenvalueObserver:
    """Measures the top eigenvalue of each block's Hessian after a step, and logs it.

    The loss is that of the step's last micro-batch on all ranks, computed once more with the new
    weights and the model in evaluation mode, so that training is not touched: no gradient, random
    number or running statistic changes. `engine.log` hands "eigenvalue/<block>" to every sink.

    Attributes:
        values: the last measurement, by the block's qualified name.
    """

    def __init__(self, section: EigenvalueSection) -> None:
        self._section = section
        self._blocks: dict[str, nn.Module] = {}
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.values: dict[str, float] = {}

    @property
    def ratios(self) -> dict[str, float]:
        """Each block's magnitude over the largest one's, in [0, 1]: how gently to compress it."""
        largest = max((abs(value) for value in self.values.values()), default=0.0)
        return {
            name: abs(value) / largest if largest else 0.0 for name, value in self.values.items()
        }

    def adjust_inputs(
        self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Remember the micro-batch; nothing is changed."""
        self._inputs = (args, kwargs)
        return args, kwargs

    def on_event(self, engine: Engine, event: Event) -> None:
        """Find the blocks at the start; measure after every so many steps. Collective."""
        if event.kind is EventKind.START:
            self._blocks = _blocks(engine.module, self._section)
            _check_whole(engine.module)
        elif event.kind is EventKind.STEP_END:
            inputs, self._inputs = self._inputs, None
            if inputs is not None and event.step % self._section.gas_boundary_resolution == 0:
                self._measure(engine, *inputs)

    def _measure(self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        section = self._section
        # Not through the module's hooks: a sharding would take this for a part of training.
        forward = engine.precision.applied_to(engine.module.forward, engine.device.type)
        values = {}
        with _untouched(engine.module, engine.device), torch.enable_grad(), twice_differentiable():
            try:
                loss = loss_of(forward(*args, **kwargs))
            except DsError as error:
                raise DsError(
                    f"eigenvalue: the model must return its loss, so that it can be computed again "
                    f"({error}); or use ds_core.curvature.Hessian in your own loop"
                ) from error
            for name, block in self._blocks.items():
                hessian = Hessian(loss, block.parameters(), average=_average(engine))
                found = top_eigenvalue(
                    hessian,
                    max_iter=section.max_iter,
                    tol=section.tol,
                    stability=section.stability,
                )
                values[name] = found.value
                if section.verbose:
                    logger.info(
                        "step %d: top eigenvalue of %s is %.4g after %d iterations%s",
                        engine.global_step,
                        name,
                        found.value,
                        found.iterations,
                        "" if found.converged else ", not converged",
                    )
        self.values = values
        engine.log({f"eigenvalue/{name}": value for name, value in values.items()})


def _blocks(model: nn.Module, section: EigenvalueSection) -> dict[str, nn.Module]:
    if section.layer_name is None:
        names = {module: name for name, module in model.named_modules()}
        found = {names[b]: b for stack in repeated_stacks(model) for b in stack}
        missing = f"{type(model).__name__} has no repeated blocks; name a list of modules"
    else:
        try:
            stack = model.get_submodule(section.layer_name)
        except AttributeError:
            stack = nn.Module()
        found = {f"{section.layer_name}.{key}": block for key, block in stack.named_children()}
        missing = f"got {section.layer_name!r}, which is no module with children"
    trained = {
        name: block
        for name, block in found.items()
        if any(parameter.requires_grad for parameter in block.parameters())
    }
    if not trained:
        raise ConfigError(f"eigenvalue.layer_name: {missing}")
    return dict(list(trained.items())[: section.layer_num or None])


def _check_whole(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.untyped_storage().nbytes() < parameter.numel() * parameter.element_size():
            raise ConfigError(
                f"eigenvalue.enabled: got true, but parameter {name!r} is sharded (ZeRO stage 3), "
                f"and second derivatives need every parameter whole; use stage 2 or below"
            )


def _average(engine: Engine) -> Callable[[torch.Tensor], None] | None:
    group = engine.mesh.group("dp")
    if group.size == 1:
        return None

    def average(vector: torch.Tensor) -> None:
        comm.all_reduce(vector, group, caller="eigenvalue")
        vector /= group.size

    return average


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, and random states of its own, inside the block."""
    modes = {module: module.training for module in model.modules()}
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        model.eval()
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def from_config(config: Config) -> EigenvalueObserver | None:
    """The observer that the section asks for, if it does."""
    section = config.section("eigenvalue")
    if not isinstance(section, EigenvalueSection) or not section.enabled:
        return None
    return EigenvalueObserver(section)
