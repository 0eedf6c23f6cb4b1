"""Kubernetes: a PyTorchJob manifest for Kubeflow's training operator.

    ds run --launcher kubernetes --num-nodes 2 --nproc 8 -O image=IMAGE train.py > job.json
    kubectl apply -f job.json

The operator tells each pod its node rank and the address of the first one; the pod's agent reads
them by `--node-rank auto --rdzv-endpoint auto`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ds_core.errors import LaunchError
from ds_core.launcher.cluster import ClusterJob, Manifest


class KubernetesLauncher:
    summary = (
        "print a PyTorchJob manifest for `kubectl apply -f -`; --num-nodes pods, paths as in the "
        "image, nothing forwarded but --env and the env file."
    )
    shares_paths = False
    options: Mapping[str, str] = {
        "image": "container image with Python, ds-core and the script; needed",
        "name": "name of the job; default: ds-run",
        "namespace": "namespace; default: that of kubectl",
        "gpus": "GPUs of each pod; default: --nproc, 0 for none",
        "gpu-resource": "name of the GPU resource; default: nvidia.com/gpu",
        "memory": "memory of each pod, such as 64Gi",
        "cpu": "processors of each pod, such as 16",
        "shm": "size of /dev/shm, such as 16Gi; default: as much as the pod's memory allows",
        "claim": "persistent volume claim to mount, as NAME:PATH",
        "service-account": "service account of the pods",
    }

    def commands(self, job: ClusterJob) -> Manifest:
        if job.nodes:
            raise LaunchError("--hostfile: Kubernetes chooses the hosts; give --num-nodes instead")
        if job.min_nodes != job.num_nodes:
            raise LaunchError(
                f"--nnodes: got {job.spec.nnodes}; the manifest is for a fixed number of pods"
            )
        if job.spec.nproc == "auto":
            raise LaunchError("--nproc: give the number of processes of each pod, not auto")
        if not job.option("image"):
            raise LaunchError("--launcher-option: kubernetes needs image=IMAGE")
        name = job.option("name", "ds-run")
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", name):
            raise LaunchError(
                f"--launcher-option: got name={name!r}, expected lower-case letters, digits and "
                "dashes, at most 50, a letter first"
            )
        return Manifest(json.dumps(_manifest(job, name), indent=2))


def _manifest(job: ClusterJob, name: str) -> dict[str, Any]:
    metadata = {"name": name}
    if job.option("namespace"):
        metadata["namespace"] = job.option("namespace")
    pod = {"spec": _pod(job)}
    replicas = {"Master": {"replicas": 1, "restartPolicy": "Never", "template": pod}}
    if job.num_nodes > 1:
        workers = {"replicas": job.num_nodes - 1, "restartPolicy": "Never", "template": pod}
        replicas["Worker"] = workers
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": metadata,
        "spec": {
            "nprocPerNode": str(job.spec.nproc),
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _pod(job: ClusterJob) -> dict[str, Any]:
    # The operator knows the container by this name.
    container: dict[str, Any] = {"name": "pytorch", "image": job.option("image")}
    words = job.agent_words("auto", None, is_tied_to_stdin=False, has_head=False)
    container["command"] = list(words[len(job.environment_words()) :])
    if job.environment:
        container["env"] = [
            {"name": key, "value": setting.value} for key, setting in job.environment.items()
        ]
    container["resources"] = {"limits": _limits(job)}
    # The default of 64 MiB is too little for data loaders and NCCL.
    memory: dict[str, str] = {"medium": "Memory"}
    if job.option("shm"):
        memory["sizeLimit"] = job.option("shm")
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": memory}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if job.option("claim"):
        claim, _, path = job.option("claim").partition(":")
        if not claim or not path.startswith("/"):
            raise LaunchError(
                f"--launcher-option: got claim={job.option('claim')!r}, expected NAME:/PATH"
            )
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "claim", "mountPath": path})
    container["volumeMounts"] = mounts
    pod: dict[str, Any] = {"containers": [container], "volumes": volumes}
    if job.option("service-account"):
        pod["serviceAccountName"] = job.option("service-account")
    return pod


def _limits(job: ClusterJob) -> dict[str, str]:
    gpus = job.option("gpus", str(job.spec.nproc))
    if not gpus.isdecimal():
        raise LaunchError(f"--launcher-option: got gpus={gpus!r}, expected a number")
    limits = {name: job.option(name) for name in ("cpu", "memory") if job.option(name)}
    if int(gpus):
        limits[job.option("gpu-resource", "nvidia.com/gpu")] = gpus
    return limits
