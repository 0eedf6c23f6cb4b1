"""Stage 3: generation with whole parameters, and what a model will need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from deepspeed._names import names_of
from deepspeed.runtime.zero._estimates import Cluster, needs, show, sizes_of
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from ds_zero import Offload

_NAME = "DeepSpeedZeroOptimizer_Stage3"

__getattr__, __dir__ = names_of(__name__, {_NAME: f"deepspeed.runtime.base_optimizer:{_NAME}"})


@contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[Any]:
    """Hold all parameters of a stage 3 engine inside the block, without the hooks that gather them.

    Collective.
    """
    with GatheredParameters(model.parameters()):
        parts = model.optimizer.parameter_offload
        for hook in (*parts.forward_hooks, *parts.backward_hooks):
            hook.remove()
        try:
            yield model
        finally:
            parts._register_deepspeed_module(parts.module)


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """Bytes per node of host memory, per GPU, and of those what the largest layer takes.

    zero_init: whether the model is built under `deepspeed.zero.Init`, and never whole on a rank.
    """
    cluster = Cluster(num_gpus_per_node, num_nodes)
    offload = Offload(
        optimizer="cpu" if cpu_offload else "device",
        parameters="cpu" if cpu_offload and cpu_offload_params else "device",
    )
    host, device = needs(
        3,
        total_params,
        largest_layer_params,
        cluster,
        offload,
        sharded_build=zero_init,
        factor=additional_buffer_factor,
    )
    return host, device, 8 * largest_layer_params


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Write what a model needs at stage 3, with and without offload, onto standard output."""
    total, largest = sizes_of(model)
    estimate_zero3_model_states_mem_needs_all_cold(
        total, largest, num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """The same of a model of which only the numbers of parameters are known."""

    def rows() -> Iterator[tuple[int, int, str]]:
        for states, params in ((True, True), (True, False), (False, False)):
            for zero_init in (True, False):
                host, device, _ = estimate_zero3_model_states_mem_needs(
                    total_params,
                    largest_layer_params,
                    num_gpus_per_node,
                    num_nodes,
                    cpu_offload=states,
                    cpu_offload_params=params,
                    zero_init=zero_init,
                    additional_buffer_factor=additional_buffer_factor,
                )
                told = f"offload_param={_home(params)}, offload_optimizer={_home(states)}"
                yield host, device, f"{told}, zero_init={int(zero_init)}"

    show(total_params, largest_layer_params, Cluster(num_gpus_per_node, num_nodes), rows())


def _home(is_offloaded: bool) -> str:
    return "cpu " if is_offloaded else "none"
