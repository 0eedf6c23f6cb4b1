"""Stages 1 and 2: what a model will need."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from deepspeed._names import names_of
from deepspeed.runtime.zero._estimates import Cluster, needs, show, sizes_of
from ds_zero import Offload

__getattr__, __dir__ = names_of(
    __name__, {"DeepSpeedZeroOptimizer": "deepspeed.runtime.base_optimizer:DeepSpeedZeroOptimizer"}
)


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """Bytes per node of host memory, and per GPU."""
    return needs(
        2,
        total_params,
        0,
        Cluster(num_gpus_per_node, num_nodes),
        Offload(optimizer="cpu" if cpu_offload else "device"),
        sharded_build=False,
        factor=additional_buffer_factor,
    )


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Write what a model needs at stage 2, with and without offload, onto standard output."""
    estimate_zero2_model_states_mem_needs_all_cold(
        sizes_of(model)[0], num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """The same of a model of which only the number of parameters is known."""

    def rows() -> Iterator[tuple[int, int, str]]:
        for cpu_offload in (True, False):
            host, device = estimate_zero2_model_states_mem_needs(
                total_params, num_gpus_per_node, num_nodes, cpu_offload, additional_buffer_factor
            )
            yield host, device, f"offload_optimizer={'cpu ' if cpu_offload else 'none'}"

    show(total_params, None, Cluster(num_gpus_per_node, num_nodes), rows())
