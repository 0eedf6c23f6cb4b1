"""Slurm: srun starts one agent on each node of an allocation."""

from __future__ import annotations

from collections.abc import Mapping

from ds_core import _env
from ds_core.launcher.cluster import ClusterJob, HostCommand


class SlurmLauncher:
    summary = (
        "srun, within an allocation (sbatch, salloc) or asking for one; --num-nodes nodes, or "
        "the hosts of --hostfile."
    )
    shares_paths = True
    options: Mapping[str, str] = {
        "partition": "partition to ask for nodes of",
        "account": "account to charge",
        "time": "time limit, such as 02:00:00",
        "gpus-per-node": "GPUs to ask for on each node",
        "cpus-per-task": "processors of each node for all its processes; default: all that the "
        "allocation has there (Slurm itself would give one)",
        "comment": "comment to give the job",
    }

    def commands(self, job: ClusterJob) -> tuple[HostCommand, ...]:
        words = ["srun", f"--nodes={job.num_nodes}", f"--ntasks={job.num_nodes}"]
        # One agent per node, which starts the processes; it may use all cores of the node.
        words += ["--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1", "--export=ALL"]
        words.append(f"--chdir={job.folder}")
        if job.nodes:
            words.append(f"--nodelist={','.join(node.host for node in job.nodes)}")
        allocated = _env.whole().get("SLURM_CPUS_ON_NODE", "")
        for name in self.options:
            value = job.option(name, allocated if name == "cpus-per-task" else "")
            if value:
                words.append(f"--{name}={value}")
        agent = job.agent_words("auto", job.common_node("slurm"), is_tied_to_stdin=False)
        return (
            HostCommand(
                hosts=tuple(node.host for node in job.nodes),
                argv=(*words, *job.arguments, *agent),
                environment={},
                is_tied=False,
            ),
        )
