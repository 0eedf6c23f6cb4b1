"""Collectives with the signatures of torch.distributed, on ds_core.comm: counted, and explained.

    from deepspeed import comm as dist

    dist.init_distributed("gloo")
    dist.all_reduce(tensor)                   # in place; with async_op=True, a handle to wait for

Groups are torch's own process groups, and work with torch.distributed too. Errors name operation,
group and the ranks that are missing; what is sent is in `ds_core.comm.all_rows()`.
"""

from __future__ import annotations

from deepspeed._names import names_of

_WORLD, _RANKS = "deepspeed.comm._world", "deepspeed.comm._groups"
_COLLECTIVES, _MESSAGES = "deepspeed.comm._collectives", "deepspeed.comm._messages"
_LOG = "deepspeed.comm._log"

HOMES = {
    "ReduceOp": "deepspeed.comm.reduce_op:ReduceOp",
    "ProcessGroup": "torch.distributed:ProcessGroup",
    **{
        name: f"{_WORLD}:{name}"
        for name in (
            *("init_distributed", "is_initialized", "is_available", "destroy_process_group"),
            *("new_group", "initialize_mesh_device", "get_local_rank"),
        )
    },
    **{
        name: f"{_RANKS}:{name}"
        for name in (
            *("get_rank", "get_world_size", "get_world_group", "get_global_rank"),
            "get_all_ranks_from_group",
        )
    },
    **{
        name: f"{_COLLECTIVES}:{name}"
        for name in (
            *("all_reduce", "all_reduce_coalesced", "inference_all_reduce", "broadcast", "reduce"),
            *("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "allgather_fn"),
            *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_fn"),
            *("all_to_all", "all_to_all_single", "gather", "scatter"),
            *("barrier", "monitored_barrier", "broadcast_object_list", "all_gather_object"),
            *("has_all_gather_into_tensor", "has_reduce_scatter_tensor"),
            *("has_all_reduce_coalesced", "has_coalescing_manager"),
        )
    },
    **{
        name: f"{_MESSAGES}:{name}"
        for name in ("send", "recv", "isend", "irecv", "P2POp", "batch_isend_irecv")
    },
    **{
        name: f"{_LOG}:{name}"
        for name in (
            *("configure", "log_summary", "reset_log", "has_comm_data"),
            *("get_comm_operation_count", "get_logged_comm_ops"),
        )
    },
}

MISSING = {
    "enable_symm_mem_for_group": "use torch.distributed._symmetric_memory",
    "init_deepspeed_backend": "use init_distributed",
    "set_backend": "use init_distributed",
    "timed_op": "use configure(enabled=True), which takes the times of all collectives",
    "mpi_discovery": "init_distributed reads what MPI, Slurm, AzureML and SageMaker set",
    "in_aml": "init_distributed reads what MPI, Slurm, AzureML and SageMaker set",
    "in_aws_sm": "init_distributed reads what MPI, Slurm, AzureML and SageMaker set",
    "in_dlts": "init_distributed reads what MPI, Slurm, AzureML and SageMaker set",
    "patch_aml_env_for_torch_nccl_backend": "init_distributed reads what AzureML sets",
    "patch_aws_sm_env_for_torch_nccl_backend": "init_distributed reads what SageMaker sets",
}

__getattr__, __dir__ = names_of(__name__, HOMES, submodules=("comm", "reduce_op"), missing=MISSING)
