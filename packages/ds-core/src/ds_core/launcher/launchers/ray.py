"""Ray: one agent on each of so many nodes of a Ray cluster, in a placement group."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from ds_core.errors import LaunchError
from ds_core.launcher.cluster import ClusterJob, HostCommand


class RayLauncher:
    summary = "--num-nodes nodes of a Ray cluster, one agent on each (needs `pip install ray`)."
    shares_paths = True
    options: Mapping[str, str] = {
        "address": "address of the cluster; default: auto, the one that this machine is part of",
        "gpus": "GPUs to reserve on each node; default: --nproc, 0 for none",
        "cpus": "processors to reserve on each node; default: 1",
        "wait": "seconds to wait for the nodes; default: 600",
    }

    def commands(self, job: ClusterJob) -> tuple[HostCommand, ...]:
        if job.nodes:
            raise LaunchError("--hostfile: Ray chooses the hosts; give --num-nodes instead")
        if job.min_nodes != job.num_nodes:
            raise LaunchError(f"--nnodes: got {job.spec.nnodes}; with Ray, give a fixed number")
        if job.spec.nproc == "auto":
            raise LaunchError("--nproc: give the number of processes of each node, not auto")
        driver = [sys.executable, "-m", "ds_core.launcher.launchers.ray_driver"]
        driver += ["--address", job.option("address", "auto")]
        driver += ["--num-nodes", str(job.num_nodes), "--folder", job.folder]
        driver += ["--gpus", job.option("gpus", str(job.spec.nproc))]
        driver += ["--cpus", job.option("cpus", "1"), "--wait-s", job.option("wait", "600")]
        agent = job.agent_words("auto", None, is_tied_to_stdin=True)
        return (
            HostCommand(
                hosts=(),
                argv=(*driver, *job.arguments, "--", *agent),
                environment={},
                is_tied=False,
            ),
        )
