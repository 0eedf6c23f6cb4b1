"""Messages between two ranks, by torch.distributed's signatures.

On gloo what is sent here has to be received here: messages carry their size in their tag, so that
two of different sizes never meet, and torch.distributed.recv waits for another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed.comm._collectives import PROGRAM
from deepspeed.comm._groups import ProcessGroup, group_of, rank_in
from deepspeed.comm._handle import Handle
from ds_core import comm
from ds_core.comm import Group
from ds_core.errors import CommError

Tensor = torch.Tensor


def send(
    tensor: Tensor,
    dst: int,
    group: ProcessGroup | None = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> None:
    """Send `tensor` to global rank `dst`, which must call `recv`; return when it is sent."""
    handle = isend(tensor, dst, group, tag, log_name=log_name)
    if handle is not None:
        handle.wait()


def recv(
    tensor: Tensor,
    src: int | None = None,
    group: ProcessGroup | None = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> int:
    """Receive into `tensor` what global rank `src` sends; returns `src`, -1 outside the group."""
    handle = irecv(tensor, src, group, tag, log_name=log_name)
    if handle is None or src is None:
        return -1
    handle.wait()
    return src


@torch.no_grad()
def isend(
    tensor: Tensor,
    dst: int,
    group: ProcessGroup | None = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Begin to send; `wait` of what is returned ends when the tensor may be changed."""
    ours = group_of(group)
    if ours is None:
        return None
    to = rank_in(ours, dst, "send")
    return Handle(comm.send(tensor, ours, to=to, tag=tag, caller=log_name, async_op=True))


@torch.no_grad()
def irecv(
    tensor: Tensor,
    src: int | None = None,
    group: ProcessGroup | None = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> Handle | None:
    """Begin to receive; `wait` of what is returned ends when the tensor is there.

    Raises CommError without `src`: nobody can say then whom a message that does not come is of.
    """
    ours = group_of(group)
    if ours is None:
        return None
    if src is None:
        raise CommError("recv: src: got None; name the rank that sends (a message from any rank "
                        "cannot be received)")  # fmt: skip
    source = rank_in(ours, src, "recv")
    return Handle(comm.recv(tensor, ours, source=source, tag=tag, caller=log_name, async_op=True))


@dataclass(frozen=True)
class P2POp:
    """One message for `batch_isend_irecv`.

    Attributes:
        op: `isend` or `irecv` of this module.
        tensor: to send, or to receive into.
        peer: global rank at the other end.
        group: process group; None: all ranks.
        tag: equal at both ends.
    """

    op: Callable[..., Any]
    tensor: Tensor
    peer: int
    group: ProcessGroup | None = None
    tag: int = 0

    def __post_init__(self) -> None:
        if self.op not in (isend, irecv):
            raise CommError(
                f"P2POp: op: got {self.op!r}, expected deepspeed.comm.isend or deepspeed.comm.irecv"
            )


@torch.no_grad()
def batch_isend_irecv(
    p2p_op_list: Sequence[P2POp],
    prof: bool = False,
    log_name: str = PROGRAM,
    debug: object = None,
) -> list[Handle]:
    """Begin several messages, which cannot wait for each other in a circle."""
    batches: dict[tuple[Group, int], list[P2POp]] = {}
    for message in p2p_op_list:
        ours = group_of(message.group)
        if ours is not None:
            batches.setdefault((ours, message.tag), []).append(message)
    handles = []
    for (ours, tag), messages in batches.items():
        sends, recvs = (
            [
                (message.tensor, rank_in(ours, message.peer, "batch_isend_irecv"))
                for message in messages
                if message.op is op
            ]
            for op in (isend, irecv)
        )
        pending = comm.exchange(sends, recvs, ours, tag=tag, caller=log_name, async_op=True)
        handles.append(Handle(pending))
    return handles
