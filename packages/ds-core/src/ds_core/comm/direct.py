"""Direct messages between all ranks of a gloo group, as parts of one collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ds_core.comm.group import Group, sized_tag


def exchange_parts(
    group: Group,
    outgoing: Callable[[int], torch.Tensor],
    incoming: Callable[[int], torch.Tensor],
) -> list[Any]:
    """Start sending one tensor to, and receiving one from, every other rank.

    Empty ones stay away. A part that is not of the size that its receiver expects never arrives,
    because its tag is another: gloo would end the process of the receiver.
    """
    pg, base = group.pg, group.next_tag()
    assert pg is not None
    peers = [(group.rank + step) % group.size for step in range(1, group.size)]
    works: list[Any] = []
    # Receives first, so that what arrives has a place to land. Peers in rotation, so that
    # not all ranks send to the same one first.
    for peer in reversed(peers):
        part = incoming(peer)
        if part.numel():
            works.append(pg.recv([part], peer, sized_tag(base, part.nbytes)))
    for peer in peers:
        part = outgoing(peer)
        if part.numel():
            works.append(pg.send([part], peer, sized_tag(base, part.nbytes)))
    return works
