"""Optimizer steps beside the streams they cannot do without, torch's own steps and DeepSpeed's.

DeepSpeed's CPUAdam takes part where `deepspeed` is installed and can build it (setuptools, ninja
and g++; it builds into TORCH_EXTENSIONS_DIR). It is built for the processor at hand, and a second
time for AVX2 alone, as most processors of users have: `DS_OPS_ISA=avx2` puts ours beside that.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from ds_core import ops
from ds_core.ops.adam8bit_step import BLOCK
from ds_ops.bench.floors import stream_floor
from ds_ops.bench.timing import Row, interleave, main, row

_BF16 = torch.bfloat16
_LR, _BETA1, _BETA2, _EPS, _DECAY = 1e-3, 0.9, 0.999, 1e-8, 0.01
_STEP = 3
_SIZES = (10_000_000, 100_000_000)

Call = Callable[[], object]


def rows(seconds: float) -> Iterator[Row]:
    """Rows of 10 and 100 million elements with one and two threads."""
    before = torch.get_num_threads()
    missing = "" if _deepspeed() else "DeepSpeed is not installed or does not build: left out"
    try:
        for threads in (1, 2)[: os.cpu_count() or 1]:
            torch.set_num_threads(threads)
            for numel in _SIZES:
                yield from _fused_rows(numel, seconds, missing)
                yield from _low_rows(numel, seconds)
                yield from _coded_rows(numel, seconds)
            yield from _other_rows(_SIZES[0], seconds)
    finally:
        torch.set_num_threads(before)


# --- Tensors and calls ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Adam:
    """What one step of Adam works on."""

    param: torch.Tensor
    grad: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    copy: torch.Tensor | None = None

    def step(self) -> None:
        """One step in one pass."""
        tensors = (self.param, self.grad, self.mean, self.square, self.copy, None, None)
        rates = (_LR, _BETA1, _BETA2, _EPS, _DECAY, _STEP, True, True, False)
        ops.run("adam_step_", *tensors, *rates, None)

    def floor(self) -> Call:
        """The streams of one step."""
        written = [self.param, self.mean, self.square]
        copies = [] if self.copy is None else [self.copy]
        return stream_floor([*written, self.grad], [*written, *copies])


def _adam(numel: int, dtype: torch.dtype, *, copied: bool) -> _Adam:
    mean, square = (torch.full((numel,), 0.01) for _ in range(2))
    copy = torch.zeros(numel, dtype=_BF16) if copied else None
    return _Adam(_noise(numel, dtype), _noise(numel, _BF16), mean, square, copy)


def _noise(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers; a million of them over and over, for more take longer than the measuring."""
    made = torch.randn(min(numel, 1 << 20), generator=torch.Generator().manual_seed(0)).to(dtype)
    return made.repeat(-(-numel // made.numel()))[:numel].contiguous()


def _torchs_step(own: _Adam) -> Call:
    """torch's fused AdamW with a cast before and one behind."""
    wide = torch.empty_like(own.param, dtype=torch.float32)
    step = torch.tensor(float(_STEP))

    def call() -> None:
        wide.copy_(own.grad)
        torch._fused_adamw_(
            [own.param],
            [wide],
            [own.mean],
            [own.square],
            [],
            [step],
            lr=_LR,
            beta1=_BETA1,
            beta2=_BETA2,
            weight_decay=_DECAY,
            eps=_EPS,
            amsgrad=False,
            maximize=False,
        )
        if own.copy is not None:
            own.copy.copy_(own.param)

    return call


def _deepspeeds_step(own: _Adam, module: Any, *, casts: bool) -> Call:
    """DeepSpeedCPUAdam's kernel, with the same casts around it or none."""
    wide = torch.empty_like(own.param) if casts else own.grad

    def call() -> None:
        if casts:
            wide.copy_(own.grad)
        rates = (_LR, _BETA1, _BETA2, _EPS, _DECAY, True)
        module.adam_update(0, _STEP, *rates, own.param, wide, own.mean, own.square)
        if own.copy is not None:
            own.copy.copy_(own.param)

    return call


@cache
def _deepspeed(*, only_avx2: bool = False) -> Any:
    """DeepSpeed's compiled module of CPUAdam, or None."""
    # It writes to stdout, where our table goes.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            builders = importlib.import_module("deepspeed.ops.op_builder.cpu.cpu_adam")
            builder = builders.CPUAdamBuilder()
            if only_avx2:
                builder.name = "cpu_adam_avx2"  # a module and a folder of its own
                builder.cpu_arch = lambda: "-march=haswell"
                builder.simd_width = lambda: "-D__AVX256__"
            module = builder.load(verbose=False)
        except Exception:  # whatever it raises: it is a guest here
            return None
    module.create_adam(0, _LR, _BETA1, _BETA2, _EPS, _DECAY, True, False)
    return module


def _error(dtype: torch.dtype) -> float:
    """How far one step's parameters are from float64's, relative to them."""
    own = _adam(1 << 20, dtype, copied=False)
    tensors = [t.double() for t in (own.param, own.grad, own.mean, own.square)]
    rates = (_LR, _BETA1, _BETA2, _EPS, _DECAY, _STEP, True, True, False)
    ops.run("adam_step_", *tensors, None, None, None, *rates, None, impl="reference")
    own.step()
    return float((own.param.double() - tensors[0]).norm() / tensors[0].norm())


def _millions(numel: int) -> str:
    return f"{numel // 1_000_000}M"


# --- Rows -----------------------------------------------------------------------------------------


def _fused_rows(numel: int, seconds: float, note: str) -> Iterator[Row]:
    """fp32 parameter and state, bf16 gradient, bf16 copy: one pass against three."""
    own, other = (_adam(numel, torch.float32, copied=True) for _ in range(2))
    peers = {"torch fused + casts": _torchs_step(other)}
    module = _deepspeed()
    if module is not None:
        peers["DeepSpeedCPUAdam + casts"] = _deepspeeds_step(other, module, casts=True)
    floor = _adam(numel, torch.float32, copied=True).floor()
    found = interleave({"ours": own.step, "floor": floor, **peers}, seconds=seconds)
    for peer in peers:
        yield row(
            "adam_step_ + bf16 copy",
            _millions(numel),
            _BF16,
            found,
            peer=peer,
            error=_error(torch.float32),
            max_x_floor=1.1,
            min_x_peer=1.6,
            note=note,
        )


def _low_rows(numel: int, seconds: float) -> Iterator[Row]:
    """bf16 parameter and gradient, fp32 state."""
    own, other = (_adam(numel, _BF16, copied=False) for _ in range(2))
    peers: dict[str, Call] = {}
    for peer, only_avx2 in (("DeepSpeedCPUAdam AVX2", True), ("DeepSpeedCPUAdam native", False)):
        module = _deepspeed(only_avx2=only_avx2)
        if module is not None:
            peers[peer] = _deepspeeds_step(other, module, casts=False)
    floor = _adam(numel, _BF16, copied=False).floor()
    found = interleave({"ours": own.step, "floor": floor, **peers}, seconds=seconds, min_rounds=3)
    for peer in peers or [""]:
        yield row(
            "adam_step_ bf16",
            _millions(numel),
            _BF16,
            found,
            peer=peer,
            error=_error(_BF16),
            min_x_peer=10 if "AVX2" in peer else None,
        )


def _coded(numel: int) -> list[torch.Tensor]:
    """Codes and scales of both moments, all in use."""
    blocks = -(-numel // BLOCK)
    codes = torch.arange(256, dtype=torch.uint8).repeat(blocks)[:numel]
    return [codes, torch.ones(blocks), codes.clone(), torch.ones(blocks)]


def _coded_rows(numel: int, seconds: float) -> Iterator[Row]:
    """8-bit states, rounded stochastically, beside fp32 states with the same parameters."""
    rates = (_LR, _BETA1, _BETA2, _EPS, _DECAY, _STEP, True)
    for dtype, copied in ((_BF16, False), (torch.float32, True)):
        wide = _adam(numel, dtype, copied=copied)
        param, copy, state = wide.param.clone(), wide.copy, _coded(numel)
        copy = None if copy is None else copy.clone()

        tensors = (param, wide.grad, *state, copy, None)
        ours = partial(ops.run, "adam8bit_step_", *tensors, *rates, 1)
        written = [t.clone() for t in (param, state[0], state[2])]
        floor = stream_floor(
            [*written, wide.grad], [*written, *([] if copy is None else [copy.clone()])]
        )
        found = interleave(
            {"ours": ours, "floor": floor, "fp32 states": wide.step}, seconds=seconds
        )
        bound = numel == _SIZES[-1] and torch.get_num_threads() == 2 and not copied
        yield row(
            "adam8bit_step_" + (" + bf16 copy" if copied else ""),
            _millions(numel),
            dtype,
            found,
            peer="fp32 states",
            min_x_peer=1.8 if bound else None,
        )


def _other_rows(numel: int, seconds: float) -> Iterator[Row]:
    """The other optimizers with fp32 parameters, bf16 gradients and a bf16 copy."""
    own = _adam(numel, torch.float32, copied=True)
    rest = {
        "lion_step_": (_LR, _BETA1, _BETA2, _DECAY, False),
        "adagrad_step_": (_LR, 0.0, 1e-10, _DECAY, _STEP, False),
        "sgd_step_": (_LR, 0.9, 0.0, _DECAY, False, False, False),
    }
    tensors = (own.param, own.grad, own.square, own.copy, None, None)
    for name, rates in rest.items():
        written = [torch.empty_like(own.param) for _ in range(2)]
        copy = torch.empty(numel, dtype=_BF16)
        calls: dict[str, Call] = {
            "ours": partial(ops.run, name, *tensors, *rates, None),
            "floor": stream_floor([*written, own.grad], [*written, copy]),
        }
        peer = ""
        if name != "lion_step_":
            peer = "torch fused + casts"
            calls[peer] = _torchs_other(name, _adam(numel, torch.float32, copied=True))
        found = interleave(calls, seconds=seconds)
        yield row(name + " + bf16 copy", _millions(numel), _BF16, found, peer=peer)


def _torchs_other(name: str, own: _Adam) -> Call:
    """torch's fused Adagrad or SGD with the same casts."""
    wide = torch.empty_like(own.param)
    param = own.param.requires_grad_()
    optimizer: torch.optim.Optimizer
    if name == "adagrad_step_":
        optimizer = torch.optim.Adagrad([param], _LR, weight_decay=_DECAY, fused=True)
    else:
        optimizer = torch.optim.SGD([param], _LR, 0.9, weight_decay=_DECAY, fused=True)

    def call() -> None:
        wide.copy_(own.grad)
        param.grad = wide
        optimizer.step()
        if own.copy is not None:
            own.copy.copy_(param.detach())

    return call


if __name__ == "__main__":
    main(rows)
