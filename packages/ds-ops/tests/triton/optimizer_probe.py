"""Checks of the steps of optimizers in Triton's interpreter, bit for bit; prints one line for each.

What is compared is exact: where both sides round every operation alike, as the interpreter does, a
step has the bits of the reference, random ones among them. Except for fp32 parameters, where a step
is divided by a root: torch's on a CPU may be the neighbour of the nearest number.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings

import interpreter_bf16
import pytest
import torch

from ds_core import ops
from ds_core.errors import OpError
from ds_core.ops.adam8bit_step import encoded
from ds_core.ops.optimizer_step import random_bits
from ds_ops.triton_kernels import optimizer_steps, stepping

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: By op: whether each state is positive, and the numbers of a step. Without bias correction, which
#: kernels multiply by where the reference divides.
STEPS = {
    "adam_step_": ((False, True), (1e-2, 0.9, 0.99, 1e-8, 0.1, 3, True, False, False)),
    "lion_step_": ((False,), (1e-2, 0.9, 0.99, 0.1, True)),
    "adagrad_step_": ((True,), (1e-2, 0.1, 1e-10, 0.1, 3, False)),
    "sgd_step_": ((False,), (1e-2, 0.9, 0.1, 0.1, False, False, False)),
}

ROOTS = ("adam_step_", "adagrad_step_")


def normal(numel, dtype, seed, *, positive=False):
    found = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return (found.square() if positive else found).to(dtype)


def tensors(name, numel, of_param, of_state):
    found = [normal(numel, of_param, 1), normal(numel, BF16, 2)]
    for index, positive in enumerate(STEPS[name][0]):
        found.append(normal(numel, of_state, 3 + index, positive=positive))
    return found


def step(impl, name, own, *, copy=None, undo=None, scale=None, seed=None, found_inf=None):
    ops.run(name, *own, copy, undo, scale, *STEPS[name][1], seed, found_inf, impl=impl)


def both(call):
    """What `call` makes of an implementation, for Triton's and for the reference."""
    return call("triton"), call("reference")


def bits(t):
    return t.reshape(-1).view(torch.uint8)


def same(ours, theirs):
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(bits(one), bits(other)), f"tensor {index}: {one} is not {other}"


def undo_for(kept, *, gap=0):
    room = torch.zeros(sum(t.nbytes for t in kept) + gap, dtype=torch.uint8)
    return room[gap:]


def steps_are_the_references():
    """In every format, rounded to nearest and at random, with copies and undo buffers."""
    for name in STEPS:
        for of_param, of_state in ((FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP32)):
            for seed in (None, 5):

                def call(impl, name=name, of_param=of_param, of_state=of_state, seed=seed):
                    own = tensors(name, 1027, of_param, of_state)
                    copy = torch.zeros(1027, dtype=BF16)
                    undo = undo_for([own[0], *own[2:]])
                    scale = torch.tensor(0.5)
                    step(impl, name, own, copy=copy, undo=undo, scale=scale, seed=seed)
                    return [*own, copy, undo]

                ours, theirs = both(call)
                if of_param is FP32 and name in ROOTS:
                    one, other = ours.pop(0), theirs.pop(0)
                    torch.testing.assert_close(one, other, rtol=3e-7, atol=1e-8)
                    same([ours[-2]], [one.to(BF16)])
                    del ours[-2], theirs[-2]
                same(ours, theirs)


def random_bits_are_the_references():
    """Also beyond the first launch: positions are counted on, whatever a launch begins with."""
    launches = stepping._PART
    try:
        for part in (1024, launches):
            stepping._PART = part

            def call(impl):
                half = torch.full((3000,), 1 + 2**-8)  # in the middle of two numbers of bf16
                param = half.to(BF16)
                grad = (half - param.float()).neg()
                rates = (1.0, 0.0, 0.0, 0.0, False, False, True)
                seed = 2**63 - 7
                tail = (None, None, None, None, *rates, seed)
                ops.run("sgd_step_", param, grad, *tail, impl=impl)
                return [param]

            same(*both(call))
    finally:
        stepping._PART = launches


def keys_count_on():
    """Behind 2^32 elements too, where no test has the memory to go."""
    for begin in (0, 1 << 28, (1 << 32) - (1 << 28), 1 << 32, (1 << 33) + (1 << 28)):
        k0, k1 = (key & 0xFFFFFFFF for key in stepping.keys(11, begin))
        high, low = begin >> 32, begin & 0xFFFFFFFF
        first, second = stepping.rounding_keys(11, high)
        assert (k0 - low * 0x9E3779B9) & 0xFFFFFFFF == first
        assert k1 == second
    assert random_bits(11, 4, torch.device("cpu")).unique().numel() == 4


def parts_are_cut_right():
    launches = stepping._PART
    try:
        stepping._PART = 1024
        steps_are_the_references()
        undo_restores_every_bit()
        eight_bit_codes_are_the_references()
        lamb_is_the_same_in_parts()
    finally:
        stepping._PART = launches


def a_flag_leaves_everything_as_it_is():
    for name in STEPS:
        for value in (1.0, 2.0, torch.nan):
            own = tensors(name, 1027, BF16, BF16)
            own[1][3] = torch.inf
            copy = torch.full((1027,), 7.0, dtype=BF16)
            before = [t.clone() for t in (*own, copy)]
            kept = [own[0], *own[2:]]
            undo = undo_for(kept)
            flag = torch.tensor(value)
            step("triton", name, own, copy=copy, undo=undo, seed=3, found_inf=flag)
            same([*own, copy], before)
            assert torch.equal(undo, torch.cat([bits(t) for t in kept]))


def undo_restores_every_bit():
    """Aligned, and not: an odd number of bf16 before fp32, or a buffer that begins anywhere."""
    for numel, of_param, of_state, gap in (
        (1026, FP32, FP32, 0),
        (1027, BF16, FP32, 0),
        (1027, BF16, BF16, 1),
        (1027, FP32, BF16, 3),
        (1027, FP16, FP32, 0),
    ):
        own = tensors("adam_step_", numel, of_param, of_state)
        kept = [own[0], *own[2:]]
        for t in kept:  # numbers that arithmetic would not give back
            t[0], t[1], t[2] = torch.nan, -0.0, torch.inf
            bits(t)[3 * t.element_size()] ^= 1
        before = [t.clone() for t in kept]
        undo = undo_for(kept, gap=gap)
        step("triton", "adam_step_", own, undo=undo, seed=1)
        assert not torch.equal(bits(own[0]), bits(before[0]))
        assert torch.equal(undo, torch.cat([bits(t) for t in before]))
        copy = torch.zeros(numel, dtype=BF16)
        ops.run("step_undo_", own[0], kept[1:], copy, undo, impl="triton")
        same(kept, before)
        assert torch.equal(copy.nan_to_num(), before[0].to(BF16).nan_to_num())


def nothing_beyond_the_end_is_touched():
    for name in STEPS:
        usual = tensors(name, 1027, BF16, BF16)
        rooms = [torch.full((1027 + 3,), 7.0, dtype=t.dtype) for t in usual]
        views = [room[1:-2].copy_(t) for room, t in zip(rooms, usual, strict=True)]
        step("triton", name, usual, seed=4)
        step("triton", name, views, seed=4)
        same([v.clone() for v in views], usual)
        assert all([float(r[at]) for at in (0, -2, -1)] == [7.0] * 3 for r in rooms)


def eight_bit_codes_are_the_references():
    for numel, dtype, seed, decoupled in (
        (1, FP32, None, True),
        (1027, FP32, None, False),
        (1100, BF16, 5, True),
        (2304, FP16, 6, True),
    ):

        def call(impl, numel=numel, dtype=dtype, seed=seed, decoupled=decoupled):
            mean, square = normal(numel, FP32, 3), normal(numel, FP32, 4, positive=True)
            if numel > 600:
                mean[512:] = 0  # a block of nothing
                square[512:] = 0
            state = [*encoded(mean, signed=True), *encoded(square, signed=False)]
            grad = normal(numel, BF16, 2)
            grad[600:] = 0
            own = [normal(numel, dtype, 1), grad, *state]
            copy = torch.zeros(numel, dtype=BF16)
            rates = (1e-2, 0.9, 0.999, 1e-8, 0.01, 3, decoupled, seed)
            ops.run("adam8bit_step_", *own, copy, torch.tensor(0.5), *rates, impl=impl)
            return [*own, copy]

        ours, theirs = both(call)
        same(ours[2:6], theirs[2:6])
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6 if dtype is FP32 else 8e-3, atol=0)
        same([ours[-1]], [ours[0].to(BF16)])


def eight_bits_keep_bad_gradients_in_their_block():
    mean = torch.zeros(1024)
    for value in (torch.nan, torch.inf):
        grad = normal(1024, FP32, 2)
        grad[300] = value
        state = [*encoded(mean, signed=True), *encoded(mean, signed=False)]
        own = [normal(1024, FP32, 1), grad, *state]
        before = [t.clone() for t in own]
        rates = (1e-2, 0.9, 0.999, 1e-8, 0.01, 3, True, 1)
        ops.run("adam8bit_step_", *own, None, None, *rates, impl="triton")
        for scales in (own[3], own[5]):
            assert torch.isfinite(scales).tolist() == [True, False, True, True]
        assert torch.isfinite(own[0]).sum() == 1023
        flag = torch.tensor(1.0)
        again = [t.clone() for t in before]
        ops.run("adam8bit_step_", *again, None, None, *rates, flag, impl="triton")
        same(again, before)


def lamb_is_the_same_in_parts():
    numel = 2500
    own = [normal(numel, FP32, seed, positive=seed == 4) for seed in (1, 2, 3, 4)]
    results = []
    before = stepping._PART
    try:
        for part in (1024, 1 << 28):
            stepping._PART = part
            mine, update = [t.clone() for t in own], torch.full((numel,), torch.nan)
            rates = (0.9, 0.999, 1e-6, 0.01, 3, True)
            squares = ops.run("lamb_update_", *mine, update, None, *rates, impl="triton")
            ratio = torch.tensor(0.5)
            ops.run("lamb_apply_", mine[0], update, None, 0.1, ratio, impl="triton")
            results.append([*mine, update, squares])
    finally:
        stepping._PART = before
    same(*results)


def lambs_direction_is_zero_where_nothing_happened():
    own = [torch.zeros(9) for _ in range(4)]
    update = torch.full((9,), torch.nan)
    rates = (0.9, 0.999, 0.0, 0.0, 1, True)
    squares = ops.run("lamb_update_", *own, update, None, *rates, impl="triton")
    assert not update.any()
    assert not squares.any()


def more_states_than_two_are_refused():
    x = torch.zeros(4)
    undo = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(OpError, match="states: got 3 tensors"):
        optimizer_steps.step_undo_(x, [x.clone() for _ in range(3)], None, undo)


CHECKS = (
    steps_are_the_references,
    random_bits_are_the_references,
    keys_count_on,
    parts_are_cut_right,
    a_flag_leaves_everything_as_it_is,
    undo_restores_every_bit,
    nothing_beyond_the_end_is_touched,
    eight_bit_codes_are_the_references,
    eight_bits_keep_bad_gradients_in_their_block,
    lamb_is_the_same_in_parts,
    lambs_direction_is_zero_where_nothing_happened,
    more_states_than_two_are_refused,
)


def main():
    warnings.simplefilter("ignore")  # numpy's own, of overflows that a GPU does not mention
    interpreter_bf16.mend()
    found = {}
    for check in CHECKS:
        begin = time.process_time()
        try:
            check()
            found[check.__name__] = ""
        except Exception:
            found[check.__name__] = traceback.format_exc(limit=-4)
        print(check.__name__, f"{time.process_time() - begin:.1f}", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
