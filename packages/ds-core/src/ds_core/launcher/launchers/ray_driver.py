"""Starts one agent on each of so many nodes of a Ray cluster; run by `ds run --launcher ray`.

    python -m ds_core.launcher.launchers.ray_driver --num-nodes 2 --gpus 8 -- COMMAND...

Each node's command finds its number in DS_NODE_RANK and the first node in MASTER_ADDR.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from typing import Any

from ds_core.launcher.manager_variables import DEFAULT_PORT

#: How long an agent may take to end its processes after it was asked to.
SHUTDOWN_S = 20.0


def main(words: list[str]) -> int:
    """Run the command on all nodes. Returns the first exit code that is not 0."""
    try:
        import ray
    except ImportError:
        sys.stderr.write("--launcher ray: Ray is not installed here; `pip install ray`\n")
        return 2
    options = _parser().parse_args(words)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    signal.signal(signal.SIGTERM, _interrupt)
    ray.init(address=options.address, logging_level="ERROR")
    try:
        return _run(ray, options, command)
    except KeyboardInterrupt:
        return 130
    finally:
        ray.shutdown()


def _run(ray: Any, options: argparse.Namespace, command: list[str]) -> int:
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": options.cpus} | ({"GPU": options.gpus} if options.gpus else {})
    group = placement_group([bundle] * options.num_nodes, strategy="STRICT_SPREAD")
    tasks: list[Any] = []

    def on_node(function: Any, number: int, *arguments: Any) -> Any:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        resources = {"num_cpus": options.cpus, "num_gpus": options.gpus, "max_retries": 0}
        task = ray.remote(function).options(scheduling_strategy=strategy, **resources)
        return task.remote(*arguments)

    try:
        ray.get(group.ready(), timeout=options.wait_s)
        first_host = ray.get(on_node(ray.util.get_node_ip_address, 0))
        for number in range(options.num_nodes):
            place = {"DS_NODE_RANK": str(number), "MASTER_ADDR": first_host}
            place["MASTER_PORT"] = str(options.port)
            tasks.append(on_node(_run_agent, number, command, options.folder, place))
        waiting = list(tasks)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            code = ray.get(done[0])
            if code:
                return int(code)
        return 0
    except GetTimeoutError:
        sys.stderr.write(
            f"--launcher ray: the cluster has not had {options.num_nodes} nodes with {bundle} free "
            f"for {options.wait_s:g} s; see `ray status`\n"
        )
        return 1
    except RayError as error:
        sys.stderr.write(f"--launcher ray: {str(error).strip().splitlines()[-1]}\n")
        return 1
    finally:
        for task in tasks:
            with contextlib.suppress(Exception):  # it has ended, or its node is gone
                ray.cancel(task)
        with contextlib.suppress(Exception):
            ray.wait(tasks, num_returns=len(tasks), timeout=SHUTDOWN_S)
        remove_placement_group(group)


def _run_agent(command: list[str], folder: str, place: dict[str, str]) -> int:
    """One node's part, in a task of Ray. The agent ends with the task: its stdin is a pipe."""
    agent = subprocess.Popen(
        command, cwd=folder, env=os.environ | place, stdin=subprocess.PIPE, start_new_session=True
    )
    assert agent.stdin is not None  # a pipe was asked for
    try:
        return agent.wait()
    except KeyboardInterrupt:  # how Ray cancels a task
        agent.stdin.close()
        return agent.wait(SHUTDOWN_S)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ray_driver", description=__doc__)
    parser.add_argument("--address", default="auto")
    parser.add_argument("--num-nodes", type=int, required=True)
    parser.add_argument("--gpus", type=float, default=0)
    parser.add_argument("--cpus", type=float, default=1)
    parser.add_argument("--wait-s", type=float, default=600)
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--folder", default=".")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
