"""Several processes, one per rank, that do as they are told: the stage for every measurement.

A `Ranks` is a set of fresh processes joined by gloo over the loopback interface, one thread each.
Each makes a worker object; `ask` calls a method of it in all of them at once. Several `Ranks`
may be alive together and be asked in turn, so that a busy machine slows all alike.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankError(RuntimeError):
    """A rank failed, died, or did not answer in time."""


class Ranks:
    """Processes 0 .. world_size-1, each with a worker.

    Args:
        world_size: number of processes.
        factory: called as `factory(rank, world_size, *args)` in each; returns the worker. It and
            the arguments must be picklable.
        start_s: how long they may take until the worker exists.

    Raises RankError with the rank's own traceback.
    """

    def __init__(
        self, world_size: int, factory: Callable[..., Any], *args: Any, start_s: float = 300.0
    ) -> None:
        # Not for the ranks, which import this file too: a peer's memory is without ds_core.
        from ds_core.testing import free_port

        context = mp.get_context("spawn")
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world_size, port, factory, args), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers("start", start_s)

    def ask(self, method: str, *args: Any, timeout_s: float = 300.0) -> list[Any]:
        """Call `worker.method(*args)` in all processes at once; their results in rank order."""
        for pipe in self._pipes:
            pipe.send((method, args))
        return self._answers(method, timeout_s)

    def _answers(self, method: str, timeout_s: float) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(timeout_s):
                    raise RankError(f"rank {rank}: no answer to {method!r} in {timeout_s:g} s")
                failure, value = pipe.recv()
            except (EOFError, OSError) as error:
                self.close()
                code = self._processes[rank].exitcode
                raise RankError(f"rank {rank} died in {method!r} (exit code {code})") from error
            if failure is not None:
                self.close()
                raise RankError(f"rank {rank} failed in {method!r}:\n{failure}")
            answers.append(value)
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _serve(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    factory: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Body of one process: make the worker, then answer until the other end closes."""
    try:
        join(rank, world_size, port)
        worker = factory(rank, world_size, *args)
        pipe.send((None, None))
        while True:
            method, arguments = pipe.recv()
            pipe.send((None, getattr(worker, method)(*arguments)))
    except EOFError:
        pass
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    finally:
        os._exit(0)  # groups of some implementations would wait for one another here


def join(rank: int, world_size: int, port: int) -> None:
    """Make this process one rank of a gloo world, on one thread, without an accelerator."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        GLOO_SOCKET_IFNAME="lo",
        CUDA_VISIBLE_DEVICES="",
        DS_ACCELERATOR="cpu",  # read by DeepSpeed
    )
    # What libraries print would be taken for results.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
