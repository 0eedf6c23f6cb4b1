"""Which blocks of keys each block of queries sees: the layouts of block-sparse attention.

A layout is `[heads, blocks, blocks]` of 0 and 1 for sequences of `blocks * block` tokens: rows are
blocks of queries, columns blocks of keys. Names, defaults and results are those of DeepSpeed up to
0.18, which later versions do not have; the same layouts come from the same state of Python's
`random`, too.

Attention that is "unidirectional" leaves out whole blocks: a token sees all of its own block. What
sees no later token at all takes `causal=True` where the layout is used.

Sources: Child et al. 2019, section 4 (fixed); Zaheer et al. 2020, section 2 (BigBird); Beltagy et
al. 2020, section 3.1 (Longformer).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from ds_core.errors import ConfigError

_DIRECTIONS = ("bidirectional", "unidirectional")


class SparsityConfig:
    """What all layouts share; a layout of your own derives from it and fills in one head.

    Args:
        num_heads: of the attention.
        block: tokens along one side of a block.
        different_layout_per_head: a layout for each head; else all have that of the first.
    """

    def __init__(
        self, num_heads: int, block: int = 16, different_layout_per_head: bool = False
    ) -> None:
        self.num_heads = _count(self, "num_heads", num_heads)
        self.block = _count(self, "block", block)
        self.different_layout_per_head = different_layout_per_head
        self.num_layout_heads = num_heads if different_layout_per_head else 1

    @property
    def is_random(self) -> bool:
        """Whether two calls of `make_layout` may differ."""
        return False

    def make_layout(self, seq_len: int) -> torch.Tensor:
        """The layout for sequences of that many tokens, `[heads, blocks, blocks]`, int64.

        Raises ConfigError if `seq_len` is no multiple of `block`, or too short for the layout.
        """
        layout = self.setup_layout(seq_len)
        for head in range(self.num_layout_heads):
            self.fill(layout[head], head)
        return self.check_and_propagate_first_head_layout(layout)

    def fill(self, blocks: torch.Tensor, head: int) -> None:
        """Set to 1 what one head sees. blocks: its `[blocks, blocks]`, zeros."""
        raise NotImplementedError(f"{type(self).__name__} has no layout: define fill()")

    def setup_layout(self, seq_len: int) -> torch.Tensor:
        """A layout of zeros. Raises ConfigError if blocks do not divide `seq_len`."""
        if seq_len % self.block:
            raise ConfigError(
                f"{type(self).__name__}: sequences of {seq_len} tokens do not consist of blocks of "
                f"{self.block}: pad them (SparseAttentionUtils.pad_to_block_size)"
            )
        blocks = seq_len // self.block
        return torch.zeros(self.num_heads, blocks, blocks, dtype=torch.int64)

    def check_and_propagate_first_head_layout(self, layout: torch.Tensor) -> torch.Tensor:
        """The layout, with what the first head has in all heads if they share it."""
        if not self.different_layout_per_head:
            layout[1:] = layout[0].clone()
        return layout

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({given})"


class DenseSparsityConfig(SparsityConfig):
    """Every block: attention as usual, to compare with."""

    def fill(self, blocks: torch.Tensor, head: int) -> None:
        """All of them."""
        blocks.fill_(1)


class FixedSparsityConfig(SparsityConfig):
    """Windows of equal size beside each other, and blocks of each window that all rows see.

    Args:
        num_heads, block, different_layout_per_head: as of `SparsityConfig`.
        num_local_blocks: of a window; its blocks see each other.
        num_global_blocks: of each window that are seen from outside, its last ones.
        attention: "bidirectional", or "unidirectional": no later blocks.
        horizontal_global_attention: the global blocks also see every block.
        num_different_global_patterns: heads in turn take the last blocks of a window, those before
            them, and so on, as global ones; needs `different_layout_per_head`.

    Raises ConfigError for values that do not fit together.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_local_blocks: int = 4,
        num_global_blocks: int = 1,
        attention: str = "bidirectional",
        horizontal_global_attention: bool = False,
        num_different_global_patterns: int = 1,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_local_blocks = _count(self, "num_local_blocks", num_local_blocks)
        self.num_global_blocks = _count(self, "num_global_blocks", num_global_blocks)
        self.attention = _direction(self, attention, horizontal_global_attention)
        self.horizontal_global_attention = horizontal_global_attention
        patterns = _count(self, "num_different_global_patterns", num_different_global_patterns)
        self.num_different_global_patterns = patterns
        if num_local_blocks % num_global_blocks:
            _refuse(
                self, "num_global_blocks", num_global_blocks,
                f"a divisor of num_local_blocks, {num_local_blocks}",
            )  # fmt: skip
        if patterns > 1 and not different_layout_per_head:
            _refuse(
                self, "num_different_global_patterns", patterns,
                "1 unless different_layout_per_head is set",
            )  # fmt: skip
        if patterns > num_local_blocks // num_global_blocks:
            _refuse(
                self, "num_different_global_patterns", patterns,
                f"at most num_local_blocks / num_global_blocks = "
                f"{num_local_blocks // num_global_blocks}",
            )  # fmt: skip

    def fill(self, blocks: torch.Tensor, head: int) -> None:
        """The windows, and the global blocks of each; a short last window has them at its end."""
        count, size, wide = len(blocks), self.num_local_blocks, self.num_global_blocks
        for begin in range(0, count, size):
            _window(blocks, begin, begin + size, self.attention)
        first = size - (1 + head % self.num_different_global_patterns) * wide
        whole = count - count % size
        starts = list(range(first, whole, size))
        if whole < count:
            starts.append(min(whole + first, count - wide))
        for start in starts:
            seen_from = 0 if self.attention == "bidirectional" else start
            blocks[seen_from:, start : start + wide] = 1
            if self.horizontal_global_attention:
                blocks[start : start + wide, :] = 1


class VariableSparsityConfig(SparsityConfig):
    """Windows of any sizes, blocks that all rows see, and random ones.

    Args:
        num_heads, block, different_layout_per_head: as of `SparsityConfig`.
        num_random_blocks: of each row, drawn from all blocks, later ones too.
        local_window_blocks: sizes of the windows; the last one repeats.
        global_block_indices: blocks that all rows see; those beyond the sequence are left out.
        global_block_end_indices: with it, each index begins a range that ends before its end.
        attention: "bidirectional", or "unidirectional": no later blocks but random ones.
        horizontal_global_attention: the global blocks also see every block.
        seed: of the random blocks; None: they come from Python's `random`, as they are at present.

    Raises ConfigError for values that do not fit together.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 0,
        local_window_blocks: Sequence[int] = (4,),
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = "bidirectional",
        horizontal_global_attention: bool = False,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_random_blocks = _count(self, "num_random_blocks", num_random_blocks, least=0)
        if not local_window_blocks or min(local_window_blocks) < 1:
            _refuse(self, "local_window_blocks", local_window_blocks, "one size or more, from 1 on")
        self.local_window_blocks = list(local_window_blocks)
        self.global_block_indices = list(global_block_indices)
        self.global_block_end_indices = _ends(self, global_block_indices, global_block_end_indices)
        self.attention = _direction(self, attention, horizontal_global_attention)
        self.horizontal_global_attention = horizontal_global_attention
        self.seed = seed

    @property
    def is_random(self) -> bool:
        """Whether it has random blocks that no seed decides."""
        return self.num_random_blocks > 0 and self.seed is None

    def fill(self, blocks: torch.Tensor, head: int) -> None:
        """Random blocks, windows, global blocks."""
        count = len(blocks)
        _fits(self, "num_random_blocks", self.num_random_blocks, count)
        _add_random(blocks, self.num_random_blocks, self.seed, head, later=True)
        begin = 0
        for size in self.local_window_blocks:
            _window(blocks, begin, begin + size, self.attention)
            begin += size
        for start in range(begin, count, self.local_window_blocks[-1]):
            _window(blocks, start, start + self.local_window_blocks[-1], self.attention)
        for start, end in _ranges(self, count):
            if self.horizontal_global_attention:
                blocks[start:end, :] = 1
            seen_from = 0 if self.attention == "bidirectional" else start
            blocks[seen_from:, start:end] = 1


class BigBirdSparsityConfig(SparsityConfig):
    """A sliding window, the first blocks for all rows and rows that see all, and random ones.

    Args:
        num_heads, block, different_layout_per_head: as of `SparsityConfig`.
        num_random_blocks: of each row.
        num_sliding_window_blocks: as many blocks around a row's own, rounded down to an odd number
            from 3 on.
        num_global_blocks: the first ones, which all rows see and which see all.
        attention: "bidirectional", or "unidirectional": no later blocks.
        seed: of the random blocks; None: they come from Python's `random`, as they are at present.

    Raises ConfigError for values that do not fit together.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 1,
        num_sliding_window_blocks: int = 3,
        num_global_blocks: int = 1,
        attention: str = "bidirectional",
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_random_blocks = _count(self, "num_random_blocks", num_random_blocks, least=0)
        window = _count(self, "num_sliding_window_blocks", num_sliding_window_blocks)
        self.num_sliding_window_blocks = window
        self.num_global_blocks = _count(self, "num_global_blocks", num_global_blocks, least=0)
        self.attention = _direction(self, attention)
        self.seed = seed
        if attention == "unidirectional" and num_random_blocks > 1:
            _refuse(
                self, "num_random_blocks", num_random_blocks,
                "0 or 1 for unidirectional attention, whose first row has one block to draw from",
            )  # fmt: skip

    @property
    def is_random(self) -> bool:
        """Whether it has random blocks that no seed decides."""
        return self.num_random_blocks > 0 and self.seed is None

    def fill(self, blocks: torch.Tensor, head: int) -> None:
        """Random blocks, the sliding window, the first rows and columns."""
        count, both = len(blocks), self.attention == "bidirectional"
        for name in ("num_random_blocks", "num_sliding_window_blocks", "num_global_blocks"):
            _fits(self, name, getattr(self, name), count)
        _add_random(blocks, self.num_random_blocks, self.seed, head, later=both)
        _slide(blocks, self.num_sliding_window_blocks)
        blocks[: self.num_global_blocks, :] = 1
        blocks[:, : self.num_global_blocks] = 1
        if not both:
            blocks.tril_()


class BSLongformerSparsityConfig(SparsityConfig):
    """A sliding window, and blocks that all rows see and that see all: Longformer's, by blocks.

    Args:
        num_heads, block, different_layout_per_head: as of `SparsityConfig`.
        num_sliding_window_blocks: as many blocks around a row's own, rounded down to an odd number
            from 3 on.
        global_block_indices: the global blocks; those beyond the sequence are left out.
        global_block_end_indices: with it, each index begins a range that ends before its end.
        attention: "bidirectional", or "unidirectional": no later blocks.

    Raises ConfigError for values that do not fit together.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_sliding_window_blocks: int = 3,
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = "bidirectional",
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        window = _count(self, "num_sliding_window_blocks", num_sliding_window_blocks)
        self.num_sliding_window_blocks = window
        self.global_block_indices = list(global_block_indices)
        self.global_block_end_indices = _ends(self, global_block_indices, global_block_end_indices)
        self.attention = _direction(self, attention)

    def fill(self, blocks: torch.Tensor, head: int) -> None:
        """The sliding window, global rows and columns."""
        count = len(blocks)
        _fits(self, "num_sliding_window_blocks", self.num_sliding_window_blocks, count)
        _slide(blocks, self.num_sliding_window_blocks)
        for start, end in _ranges(self, count):
            blocks[start:end, :] = 1
            blocks[:, start:end] = 1
        if self.attention == "unidirectional":
            blocks.tril_()


class LocalSlidingWindowSparsityConfig(SparsityConfig):
    """A sliding window alone.

    Args:
        num_heads, block: as of `SparsityConfig`.
        num_sliding_window_blocks: as many blocks around a row's own, rounded down to an odd number
            from 3 on; of them, unidirectional attention has the row's own and those before it.
        attention: "unidirectional" or "bidirectional".
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        num_sliding_window_blocks: int = 3,
        attention: str = "unidirectional",
    ) -> None:
        super().__init__(num_heads, block)
        window = _count(self, "num_sliding_window_blocks", num_sliding_window_blocks)
        self.num_sliding_window_blocks = window
        self.attention = _direction(self, attention)

    def fill(self, blocks: torch.Tensor, head: int) -> None:
        """The window."""
        _fits(self, "num_sliding_window_blocks", self.num_sliding_window_blocks, len(blocks))
        _slide(blocks, self.num_sliding_window_blocks)
        if self.attention == "unidirectional":
            blocks.tril_()


# --- Parts of layouts -----------------------------------------------------------------------------


def _window(blocks: torch.Tensor, begin: int, end: int, attention: str) -> None:
    """Have the blocks from begin to end see each other; unidirectional: those before them."""
    window = blocks[begin:end, begin:end]
    ones = torch.ones_like(window)
    window |= ones.tril_() if attention == "unidirectional" else ones


def _slide(blocks: torch.Tensor, size: int) -> None:
    """Have each block see itself and `size // 2` on either side."""
    place = torch.arange(len(blocks))
    blocks |= (place[:, None] - place).abs() <= size // 2


def _add_random(
    blocks: torch.Tensor, number: int, seed: int | None, head: int, *, later: bool
) -> None:
    """Have each row see `number` random blocks; later: also of those behind its own."""
    source: Any = random if seed is None else random.Random(f"{seed} {head}")
    for row in range(len(blocks)):
        blocks[row, source.sample(range(len(blocks) if later else row + 1), number)] = 1


def _ranges(
    config: VariableSparsityConfig | BSLongformerSparsityConfig, count: int
) -> list[tuple[int, int]]:
    """From where to where global blocks of a sequence of `count` blocks go."""
    starts = config.global_block_indices
    ends = config.global_block_end_indices or [start + 1 for start in starts]
    return [(a, min(b, count)) for a, b in zip(starts, ends, strict=True) if a < count]


# --- Refusals -------------------------------------------------------------------------------------


def _refuse(config: SparsityConfig, key: str, got: Any, expected: str) -> None:
    raise ConfigError(f"{type(config).__name__}: {key}: got {got!r}, expected {expected}")


def _count(config: SparsityConfig, key: str, value: int, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        _refuse(config, key, value, f"an integer from {least} on")
    return value


def _fits(config: SparsityConfig, key: str, value: int, blocks: int) -> None:
    if value > blocks:
        _refuse(config, key, value, f"no more than the {blocks} blocks of the sequence")


def _direction(config: SparsityConfig, attention: str, horizontal: bool = False) -> str:
    if attention not in _DIRECTIONS:
        _refuse(config, "attention", attention, " or ".join(_DIRECTIONS))
    if horizontal and attention != "bidirectional":
        _refuse(config, "horizontal_global_attention", True, "False for unidirectional attention")
    return attention


def _ends(
    config: SparsityConfig, starts: Sequence[int], ends: Sequence[int] | None
) -> list[int] | None:
    if any(start < 0 for start in starts):
        _refuse(config, "global_block_indices", list(starts), "indices from 0 on")
    if ends is None:
        return None
    if len(ends) != len(starts) or any(a >= b for a, b in zip(starts, ends, strict=True)):
        _refuse(
            config, "global_block_end_indices", list(ends),
            f"one end behind each of global_block_indices, {list(starts)}",
        )  # fmt: skip
    return list(ends)
