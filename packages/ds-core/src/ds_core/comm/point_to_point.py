"""Messages between two ranks of a group.

Each function returns a `Pending` when `async_op` is true, else None once complete. The sender and
the receiver must agree on shape, dtype and tag.

With the check of a mesh on, every message on gloo is announced by a small one that says its shape
and dtype, which the receiver compares before it lets the message itself in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_core.comm.failure import Call, call_of, sequence_differs
from ds_core.comm.group import MAX_TAG, Group, message_tag
from ds_core.comm.pending import Finish, Pending, run, wait_for_message
from ds_core.errors import CommError

# Tags of announcements are those of their messages and this.
_ANNOUNCED = 1 << 29
_HEADER_BYTES = 128


def send(
    tensor: torch.Tensor,
    group: Group,
    *,
    to: int,
    tag: int = 0,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Send `tensor` (contiguous) to rank `to` of the group, which must call `recv`."""
    _check_peer("send", "to", to, tag, group, caller)

    def start() -> tuple[Sequence[Any], None]:
        return _start_send(tensor, group, to, tag), None

    return run(
        "send",
        group,
        caller,
        start,
        async_op,
        tensors=tensor,
        detail=f"to {to}",
        sent_bytes=tensor.numel() * tensor.element_size(),
        message_bytes=tensor.numel() * tensor.element_size(),
        direct=True,
        peers=(to,),
    )


def recv(
    tensor: torch.Tensor,
    group: Group,
    *,
    source: int,
    tag: int = 0,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Receive into `tensor` (contiguous) what rank `source` of the group sends."""
    _check_peer("recv", "source", source, tag, group, caller)

    def start() -> tuple[Sequence[Any], None]:
        return _start_recv(tensor, group, source, tag, caller), None

    return run(
        "recv",
        group,
        caller,
        start,
        async_op,
        tensors=tensor,
        detail=f"from {source}",
        message_bytes=tensor.numel() * tensor.element_size(),
        direct=True,
        peers=(source,),
    )


def exchange(
    sends: Sequence[tuple[torch.Tensor, int]],
    recvs: Sequence[tuple[torch.Tensor, int]],
    group: Group,
    *,
    tag: int = 0,
    caller: str = "",
    async_op: bool = False,
) -> Pending | None:
    """Several messages at once, which cannot wait for each other in a circle.

    sends: (tensor, rank of the group that it goes to); recvs: (tensor, rank that it comes from).
    Several between the same two ranks arrive in order. Every peer must call as well.
    """
    for _, peer in sends:
        _check_peer("exchange", "to", peer, tag, group, caller)
    for _, peer in recvs:
        _check_peer("exchange", "source", peer, tag, group, caller)

    def start() -> tuple[Sequence[Any], Finish]:
        pg = group.pg
        assert pg is not None
        if group.backend == "gloo":
            works = [w for t, p in recvs for w in _start_recv(t, group, p, tag, caller)]
            return works + [w for t, p in sends for w in _start_send(t, group, p, tag)], None
        # Backends without tags start all of them as one.
        device = group.control_device()
        pg._start_coalescing(device)
        works = [pg.send([tensor], peer, tag) for tensor, peer in sends]
        works += [pg.recv([tensor], peer, tag) for tensor, peer in recvs]
        whole = pg._end_coalescing(device)
        return works if whole is None else [whole], None

    sent = sum(tensor.nbytes for tensor, _ in sends)
    return run(
        "exchange",
        group,
        caller,
        start,
        async_op,
        detail=f"{len(sends)} out, {len(recvs)} in",
        sent_bytes=sent,
        message_bytes=max(sent, sum(tensor.nbytes for tensor, _ in recvs)),
        direct=True,
        peers=sorted({peer for _, peer in (*sends, *recvs)}),
        empty=not sends and not recvs,
    )


class _CheckedReceipt:
    """A message that is let in once its announcement has come and fits."""

    def __init__(
        self, tensor: torch.Tensor, group: Group, source: int, tag: int, caller: str
    ) -> None:
        self._tensor, self._group, self._source = tensor, group, source
        self._tag, self._caller = tag, caller
        self._header = torch.empty(_HEADER_BYTES, dtype=torch.uint8)
        assert group.pg is not None
        header = message_tag(tag, 0) | _ANNOUNCED
        self._announcement: Any = group.pg.recv([self._header], source, header)

    def is_completed(self) -> bool:
        return False

    def wait(self, *timeout: Any) -> None:
        group = self._group
        assert group.pg is not None
        wait_for_message(self._announcement, group)
        announced = bytes(self._header.tolist()).rstrip(b"\0").decode()
        if announced != _told(self._tensor):
            call = call_of("recv", self._caller, self._tensor, f"from {self._source}")
            calls = {
                group.ranks[self._source]: f"sends {announced}",
                dist.get_rank(): f"expects {_told(self._tensor)}",
            }
            raise sequence_differs(Call("recv", call.caller), group.num_started, group, calls)
        tag = message_tag(self._tag, self._tensor.nbytes)
        wait_for_message(group.pg.recv([self._tensor], self._source, tag), group)


def _start_send(tensor: torch.Tensor, group: Group, to: int, tag: int) -> list[Any]:
    pg = group.pg
    assert pg is not None
    works: list[Any] = []
    if group.check is not None and group.backend == "gloo":
        text = _told(tensor).encode()[:_HEADER_BYTES].ljust(_HEADER_BYTES, b"\0")
        header = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        works.append(pg.send([header], to, message_tag(tag, 0) | _ANNOUNCED))
    works.append(pg.send([tensor], to, _tag_of(tensor, tag, group)))
    return works


def _start_recv(
    tensor: torch.Tensor, group: Group, source: int, tag: int, caller: str
) -> list[Any]:
    assert group.pg is not None
    if group.check is not None and group.backend == "gloo":
        return [_CheckedReceipt(tensor, group, source, tag, caller)]
    return [group.pg.recv([tensor], source, _tag_of(tensor, tag, group))]


def _tag_of(tensor: torch.Tensor, tag: int, group: Group) -> int:
    """On gloo messages of another size do not meet, instead of ending the receiver's process."""
    return message_tag(tag, tensor.nbytes) if group.backend == "gloo" else tag


def _told(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _check_peer(op: str, name: str, peer: int, tag: int, group: Group, caller: str) -> None:
    who = f"{op} of {caller or 'the caller'}"
    if not 0 <= peer < group.size or (peer == group.rank and group.size > 1):
        raise CommError(
            f"{who}: {name}: got {peer}, expected another rank of the group, 0 to {group.size - 1} "
            f"without {group.rank}"
        )
    if not 0 <= tag < MAX_TAG:
        raise CommError(f"{who}: tag: got {tag}, expected 0 to {MAX_TAG - 1}")
