"""Which blocks of keys each block of queries sees, and the lists that kernels walk along."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch

from ds_core.ops.arguments import expect

#: Queries and keys that a kernel takes at a time.
TILE = 64
#: The smallest blocks that kernels know, and what all their blocks are multiples of.
SMALLEST = 16
#: Of an entry in a list: which parts of the tile see its unit; the unit's number is above them.
PART_BITS = TILE // SMALLEST

_NAME = "BlockLayout"


class BlockLayout:
    """A layout of block-sparse attention, made ready once for all calls on all devices.

        layout = BlockLayout(config.make_layout(4096), config.block)
        out = block_sparse_attention(q, k, v, layout)

    Args:
        blocks: `[heads, n, n]`, or `[1, n, n]` for a layout that all heads share; not 0 where a
            block of queries (row) sees a block of keys (column). Heads that are alike become one.
        block: tokens along one side of a block; kernels on GPUs take multiples of 16.
        causal: no query sees a later key, inside of blocks too.

    Attributes:
        blocks: bool, on the CPU.
        block, causal: as given.

    Raises OpError for shapes that are none of a layout.
    """

    def __init__(self, blocks: torch.Tensor, block: int, *, causal: bool = False) -> None:
        square = blocks.dim() == 3 and blocks.shape[0] > 0 and blocks.shape[1] == blocks.shape[2]
        expect(square, _NAME, "blocks", f"shape {list(blocks.shape)}", "[heads, n, n]")
        expect(block > 0, _NAME, "block", block, "1 or more")
        own = blocks.detach().to("cpu", torch.bool, copy=True)
        self.blocks = own[:1].clone() if bool((own == own[:1]).all()) else own
        self.block, self.causal = block, causal
        self._ready: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """Of the sequences that it is for."""
        return int(self.blocks.shape[1]) * self.block

    @property
    def density(self) -> float:
        """Which part of all blocks there is."""
        return float(self.blocks.float().mean()) if self.blocks.numel() else 0.0

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """On a device: the blocks, the lists of the rows, the lists of the columns.

        The first call for a device copies, which cannot be part of a CUDA graph; later ones find
        what is there.
        """
        if device not in self._ready:
            self._prepare(device)
        return self._ready[device]

    def _prepare(self, device: torch.device) -> None:
        with self._lock:
            cpu = torch.device("cpu")
            if cpu not in self._ready:
                self._ready[cpu] = (self.blocks, *lists(self.blocks, self.block, self.causal))
            blocks, rows, columns = self._ready[cpu]
            self._ready[device] = (blocks.to(device), rows.to(device), columns.to(device))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the layout; what was made from it is made again."""
        return partial(BlockLayout, causal=self.causal), (self.blocks, self.block)

    def __repr__(self) -> str:
        heads, count, _ = self.blocks.shape
        return (
            f"BlockLayout({heads} x {count} x {count} blocks of {self.block}, "
            f"{self.density:.1%} of them there{', causal' if self.causal else ''})"
        )


def unit_of(block: int) -> int:
    """How many tokens kernels take together of a layout with such blocks; 0: they cannot."""
    return next((unit for unit in (64, 32, 16) if block % unit == 0), 0)


def lists(blocks: torch.Tensor, block: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What kernels walk along: for each tile of queries its keys, for each of keys its queries.

    Both are int32 on the CPU, and empty for blocks that no kernel takes. A list has

    * the number of heavy tiles in front of the order, as long rows begin first;
    * four tables `[heads, tiles]`: the tiles in order, longest first; of each tile where its
      entries begin, how many groups of them need no mask, and how many groups there are;
    * the entries: `unit * 16 + parts`, where a unit is `unit_of(block)` tokens, and bit i of
      `parts` says that the i-th unit of the tile sees it. A group is a tile full of units.
    """
    unit = unit_of(block)
    if unit == 0:
        empty = torch.empty(0, dtype=torch.int32)
        return empty, empty
    fine = blocks
    if block != unit:
        fine = blocks.repeat_interleave(block // unit, 1).repeat_interleave(block // unit, 2)
    rows = _list(fine, unit, "after" if causal else "")
    return rows, _list(fine.transpose(1, 2), unit, "before" if causal else "")


def _list(fine: torch.Tensor, unit: int, hidden: str) -> torch.Tensor:
    """The list of a layout of units; hidden: units "after" or "before" a tile's are not seen."""
    heads, count, _ = fine.shape
    parts = TILE // unit
    tiles = -(-count // parts)
    own, other = torch.arange(count)[:, None], torch.arange(count)
    whole = torch.ones(count, count, dtype=torch.bool)
    if hidden:
        fine = fine & (other <= own if hidden == "after" else other >= own)
        whole = other < own if hidden == "after" else other > own
    missing = tiles * parts - count
    pad = torch.nn.functional.pad
    seen = pad(fine, (0, 0, 0, missing)).view(heads, tiles, parts, count)
    # Rows that do not exist need no mask.
    clear = pad(fine & whole, (0, 0, 0, missing), value=True).view(heads, tiles, parts, count)
    bits = (seen.int() << torch.arange(parts, dtype=torch.int32)[:, None]).sum(2)
    full, some = clear.all(2), bits > 0
    rank = torch.where(full, 0, torch.where(some, 1, 2)).to(torch.uint8)
    order = torch.argsort(rank, dim=2, stable=True)
    entries = (order << PART_BITS) | bits.gather(2, order)
    entries = pad(entries, (0, -count % parts))
    groups = -(-some.sum(2) // parts)
    taken = torch.arange(entries.shape[2]) < groups[..., None] * parts
    lengths = (groups * parts).flatten()
    begins = (lengths.cumsum(0) - lengths).view(heads, tiles)
    longest = torch.argsort(groups, dim=1, descending=True, stable=True)
    heavy = (groups > 2 * groups.float().mean(1, keepdim=True)).sum(1).amax() if tiles else 0
    tables = (longest, begins, full.sum(2) // parts, groups)
    flat = [torch.as_tensor([int(heavy)]), *(t.flatten() for t in tables), entries[taken]]
    return torch.cat(flat).to(torch.int32)
