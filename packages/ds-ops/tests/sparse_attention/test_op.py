"""sparse_attention: every implementation against the reference, and what a user relies on."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import ds_ops
from ds_core import ops
from ds_core.errors import OpError
from ds_core.ops import block_layout
from ds_core.ops import sparse_attention as op
from ds_core.ops.checking import compare
from ds_core.testing.contracts import OpContract
from ds_ops.torch_kernels.sparse_attention import by_flex, partly

CPU = torch.device("cpu")


class TestSparseAttention(OpContract):
    op = "sparse_attention"


class TestSparseAttentionBackward(OpContract):
    op = "sparse_attention_backward"
    compiled = False


def qkv(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def layout(blocks=4, block=16, heads=1, **more):
    return ds_ops.BlockLayout(op.pattern(blocks, heads), block, **more)


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_torchs_attention_with_the_layout_as_mask(causal):
    q, k, v = qkv(2, 3, 64, 8)
    blocks = layout(heads=3, causal=causal)
    mask = blocks.blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    if causal:
        mask = mask.tril()
    out = ds_ops.block_sparse_attention(q, k, v, blocks)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_gradients_are_right():
    q, k, v = (t.detach().double().requires_grad_() for t in qkv(1, 2, 8, 3))
    blocks = layout(4, 2)
    pairs = torch.ones(8, 8, dtype=torch.bool)
    pairs[5] = False

    def call(*qkv):
        with ops.use(sparse_attention="reference", sparse_attention_backward="reference"):
            return ds_ops.block_sparse_attention(*qkv, blocks, attn_mask=pairs)

    assert torch.autograd.gradcheck(call, (q, k, v))


def test_queries_that_see_nothing_get_zeros_and_give_no_gradient():
    q, k, v = qkv(1, 1, 64, 16)
    pairs = torch.ones(64, 64, dtype=torch.bool)
    pairs[40] = False
    out = ds_ops.block_sparse_attention(q, k, v, layout(), attn_mask=pairs)
    out.sum().backward()
    for hidden in (slice(16, 32), 40):  # the layout's second row of blocks, and the mask's row
        assert not out[0, 0, hidden].any()
        assert not q.grad[0, 0, hidden].any()
    assert out[0, 0, 41].all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("mode", op.MODES)
def test_masks_are_added_or_say_what_is_seen(mode):
    q, k, v = (t.detach() for t in qkv(2, 2, 32, 8))
    dense = ds_ops.BlockLayout(torch.ones(1, 2, 2), 16)
    hides = torch.rand(32, 32) < 0.3
    numbers = (~hides).float() if mode == "mul" else torch.where(hides, -torch.inf, 0.5)
    modes = {"key_padding_mask_mode": mode, "attn_mask_mode": mode}
    pairs = ds_ops.block_sparse_attention(q, k, v, dense, attn_mask=numbers, **modes)
    torch.testing.assert_close(pairs, F.scaled_dot_product_attention(q, k, v, attn_mask=~hides))
    keys = numbers[:2].contiguous()
    padded = ds_ops.block_sparse_attention(q, k, v, dense, key_padding_mask=keys, **modes)
    seen = ~hides[:2, None, None]
    torch.testing.assert_close(padded, F.scaled_dot_product_attention(q, k, v, attn_mask=seen))


def test_a_bias_is_broadcast():
    q, k, v = (t.detach() for t in qkv(2, 2, 32, 8))
    dense = ds_ops.BlockLayout(torch.ones(1, 2, 2), 16)
    for shape in ((32, 32), (2, 32, 32), (2, 1, 32, 32), (2, 2, 32, 32)):
        rpe = torch.randn(shape)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=rpe)
        torch.testing.assert_close(ds_ops.block_sparse_attention(q, k, v, dense, rpe=rpe), expected)


def test_the_scale_is_that_of_the_call():
    q, k, v = (t.detach() for t in qkv(1, 1, 64, 8))
    uniform = ds_ops.block_sparse_attention(q, k, v, layout(), scale=0.0)
    torch.testing.assert_close(uniform[0, 0, 32], v[0, 0].mean(0))


def test_a_nan_is_not_hidden():
    q, k, v = (t.detach() for t in qkv(1, 1, 64, 8))
    q[0, 0, 3, 2] = torch.nan
    out = ds_ops.block_sparse_attention(q, k, v, layout())
    assert out[0, 0, 3].isnan().all()
    assert out[0, 0, 4:].isfinite().all()


def test_what_makes_no_sense_is_refused():
    q, k, v = qkv(1, 1, 64, 8)
    square = torch.zeros(64, 64, requires_grad=True)

    def call(blocks=None, **given):
        return ds_ops.block_sparse_attention(q, k, v, blocks or layout(), **given)

    for told, given in (
        ("rpe: it requires a gradient", {"rpe": square}),
        ("attn_mask: it requires a gradient", {"attn_mask": square}),
        ("attn_mask_mode: got or, expected add or mul", {"attn_mask_mode": "or"}),
        ("key_padding_mask_mode: got None", {"key_padding_mask_mode": None}),
        ("rpe: got shape", {"rpe": torch.zeros(1, 1, 1, 64, 64)}),
        (
            "attn_mask: got torch.bool",
            {"attn_mask": torch.ones(64, 64) > 0, "attn_mask_mode": "add"},
        ),
        ("80 tokens, expected blocks that make up q's 64", {"blocks": layout(5)}),
    ):
        with pytest.raises(OpError, match=told):
            call(**given)
    assert call(rpe=square.detach()).requires_grad
    with pytest.raises(OpError, match=r"BlockLayout: blocks: got shape \[2, 3\]"):
        ds_ops.BlockLayout(torch.ones(2, 3), 16)
    with pytest.raises(OpError, match="BlockLayout: block: got 0"):
        ds_ops.BlockLayout(torch.ones(1, 3, 3), 0)


def test_layouts_are_shared_copied_and_shown():
    blocks = layout(4, 16, 1, causal=True)
    assert repr(blocks) == "BlockLayout(1 x 4 x 4 blocks of 16, 62.5% of them there, causal)"
    alike = ds_ops.BlockLayout(op.pattern(4).expand(3, 4, 4), 16)
    assert (alike.blocks.shape[0], alike.tokens, alike.density) == (1, 64, 0.625)
    assert all(one is other for one, other in zip(blocks.on(CPU), blocks.on(CPU), strict=True))
    for again in (copy.deepcopy(blocks), pickle.loads(pickle.dumps(blocks))):
        assert (again.block, again.causal) == (16, True)
        assert all(map(torch.equal, again.on(CPU), blocks.on(CPU)))


# --- The lists that kernels walk along ------------------------------------------------------------


def walked(plan, heads, tokens, unit, turned):
    """Which tokens see which, `[heads, tokens, tokens]`, as a kernel would go along the list."""
    tiles, parts = -(-tokens // 64), 64 // unit
    heavy, numbers = int(plan[0]), plan[1:].tolist()
    tables = [
        [numbers[(table * heads + head) * tiles :][:tiles] for head in range(heads)]
        for table in range(4)
    ]
    entries = numbers[4 * heads * tiles :]
    seen = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    for head in range(heads):
        order, begins, full, groups = (table[head] for table in tables)
        assert sorted(order) == list(range(tiles))
        lengths = [groups[tile] for tile in order]
        assert lengths == sorted(lengths, reverse=True)
        assert all(2 * sum(groups) >= tiles * n for n in lengths[heavy:])
        for tile in range(tiles):
            for place in range(groups[tile] * parts):
                entry = entries[begins[tile] + place]
                other = slice((entry >> 4) * unit, ((entry >> 4) + 1) * unit)
                for part in range(parts):
                    own = slice(tile * 64 + part * unit, tile * 64 + (part + 1) * unit)
                    if entry >> part & 1:
                        seen[(head, other, own) if turned else (head, own, other)] = True
                    else:  # what needs no mask is seen by all of the tile that there is
                        assert place >= full[tile] * parts or own.start >= tokens
    return seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("block", "blocks", "heads"), [(16, 11, 2), (16, 1, 1), (32, 5, 1), (64, 3, 2), (128, 2, 1)]
)
def test_lists_are_the_layout(block, blocks, heads, causal):
    pattern = op.pattern(blocks, heads)
    rows, columns = block_layout.lists(pattern, block, causal)
    unit = block_layout.unit_of(block)
    expected = pattern.repeat_interleave(block, 1).repeat_interleave(block, 2)
    if causal:  # down to units; the kernel hides what is later inside of one
        token = torch.arange(blocks * block) // unit
        expected = expected & (token <= token[:, None])
    for plan, turned in ((rows, False), (columns, True)):
        assert torch.equal(walked(plan, heads, blocks * block, unit, turned), expected)


def test_narrow_columns_cost_what_they_are():
    """Every fourth column of blocks is a quarter of the work, though each tile has one."""
    pattern = torch.zeros(1, 64, 64, dtype=torch.bool)
    pattern[:, :, ::4] = True
    rows, _ = block_layout.lists(pattern, 16, False)
    groups = rows[1 + 3 * 16 : 1 + 4 * 16]
    assert groups.tolist() == [4] * 16
    assert torch.equal(groups, rows[1 + 2 * 16 : 1 + 3 * 16])  # and needs no mask


def test_rows_that_see_everything_begin_first():
    config = ds_ops.BSLongformerSparsityConfig(1, 64, global_block_indices=[5])
    rows, columns = block_layout.lists(config.make_layout(64 * 32).bool(), 64, False)
    for plan in (rows, columns):
        assert plan[:2].tolist() == [1, 5]


def test_blocks_that_kernels_do_not_take_have_no_lists():
    assert [len(t) for t in block_layout.lists(torch.ones(1, 2, 2) > 0, 24, False)] == [0, 0]


# --- Other implementations ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_a_peer():
    spec = ops.get("sparse_attention")

    def flex(q, k, v, *rest):
        return by_flex(q, k, v, op.Options(*rest))

    made = spec.cases(CPU, torch.float32)
    for args in (made[1], made[3]):
        assert not compare(spec, flex, args).problem


def test_flex_attention_takes_heads_that_it_can():
    wide, narrow = (torch.empty(1, 1, 16, d, device="meta") for d in (16, 8))
    assert partly(wide) is None
    assert "heads of 16" in partly(narrow)
    assert partly(narrow.new_empty(narrow.shape, device="cpu")) is None


_OTHER_CONFIGS = """
import torch
from ds_core import ops
from ds_core.ops.checking import compare
from ds_core.ops.sparse_attention import BlockLayout, example, pattern, reference
from ds_core.ops.arguments import randn
from ds_ops.triton_kernels import targets
targets.INTERPRETED = targets.TARGETS["sm_90"]
cpu = torch.device("cpu")
for block, blocks, d, masks in ((64, 3, 16, {}), (16, 5, 80, {"rpe": (1, 1), "key_mask": "mul"})):
    layout = BlockLayout(pattern(blocks), block, causal=bool(masks))
    args = example(cpu, torch.float32, (1, 1, blocks * block, d), layout, **masks)
    forward = ops.get("sparse_attention")
    found = compare(forward, lambda *a: ops.run(forward.name, *a, impl="triton"), args)
    assert not found.problem, found
    grad = randn(cpu, torch.float32, *args[0].shape)
    args = (grad, *args[:3], *reference(*args), *args[3:])
    backward = ops.get("sparse_attention_backward")
    found = compare(backward, lambda *a: ops.run(backward.name, *a, impl="triton"), args)
    assert not found.problem, found
refused = ((16, 144, "head size up to 128"), (24, 16, "got 24, expected a multiple of 16"))
for block, d, told in refused:
    q = torch.zeros(1, 1, block, d)
    rest = (*BlockLayout(pattern(1), block).on(cpu), block, False, 1.0)
    try:
        ops.run(forward.name, q, q, q, *rest, impl="triton")
    except Exception as error:
        assert told in str(error), error
        print("refused")
"""


def test_configs_of_other_gpus_compute_the_same():
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _OTHER_CONFIGS],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["refused", "refused"]
