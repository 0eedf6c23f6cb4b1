"""What computes an operation: a contract with its reference, and implementations that compete."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class Floor:
    """What an op cannot do without: the least that any machine must move and compute for it.

    Attributes:
        read_bytes, written_bytes: each input read once, each output written once.
        flops: multiplications and additions.
    """

    read_bytes: int
    written_bytes: int
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Read and written together."""
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class Autograd:
    """How an op is differentiated, as `torch.library.register_autograd` takes it.

    Attributes:
        setup: `setup(ctx, inputs, output)`: saves what `backward` needs.
        backward: `backward(call, ctx, *gradients)`: a gradient or None per input. It computes by
            `call("name", *args)`, so that the implementation that ran forward also runs backward.
    """

    setup: Callable[..., None]
    backward: Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """One operation: its contract and its truth.

    Attributes:
        name: such as "rms_norm"; of one that changes its arguments it ends in "_".
        schema: as `torch.library` reads it, without the name: "(Tensor x, float eps) -> Tensor".
        reference: plain torch, at least fp32 inside (float64 for float64 inputs), readable over
            fast; runs anywhere. Its docstring is the contract: shapes, dtypes, formula, source.
        fake: the results' shapes, dtypes and devices, without data; refuses what cannot work.
        dtypes: of the arguments that it takes; what `cases` is asked for.
        tolerance: largest distance from the truth of a result, by the result's dtype; see
            `ds_core.ops.tolerance`. Results that are not floats must be equal.
        cases: example arguments that every implementation is tested on, made for a device and
            dtype: ordinary, odd, single and empty sizes, unaligned views.
        refused: (fragment of the message, arguments) of calls that must be an error.
        floor: bytes and FLOPs of a call with these arguments.
        benchmarks: (label, arguments) at sizes of real models, for `ds ops bench`.
        autograd: None if the op has no gradient.
        measured: whether `tolerance` is compared with; False for results that are random, which
            have tests of their own.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    dtypes: Sequence[torch.dtype]
    tolerance: Mapping[torch.dtype, float]
    cases: Callable[[torch.device, torch.dtype], Sequence[tuple[Any, ...]]]
    refused: Callable[[torch.device], Sequence[tuple[str, tuple[Any, ...]]]]
    floor: Callable[..., Floor]
    benchmarks: Callable[[torch.device], Sequence[tuple[str, tuple[Any, ...]]]]
    autograd: Autograd | None = None
    measured: bool = True


@runtime_checkable
class Implementation(Protocol):
    """One way to compute an `Op`; packages register theirs under `ds_core.ops`.

    Attributes:
        op: the op's name.
        name: of the implementation: "cpp", "triton", "cuda", "torch".
        priority: the highest that can run is chosen; the reference has 0.
        devices: kinds of device that it is meant for; empty: all. On others it is not missed.
    """

    op: str
    name: str
    priority: int
    devices: tuple[str, ...]

    def unavailable(self, device_type: str) -> str | None:
        """Why it cannot run on such a device here, or None if it can. Builds nothing.

        What could be built here is available, even if its build then fails: that is an error of
        the first call, with its cause, and no reason to compute by something slower.
        """

    def state(self, device_type: str) -> str:
        """What using it would take: "python", "prebuilt", "cached", "will build" or "jit"."""

    def partly(self) -> Callable[..., str | None] | None:
        """None if it computes every call that the op allows, as most do.

        Else a function of a call's arguments, also of wrong ones, that says why it does not take
        them, or None if it does. Looks at shapes, dtypes and strides, never at values. What it does
        not take is computed by the next one that can run.
        """

    def traced(self) -> Callable[..., Any] | None:
        """The kernel as `torch.compile` may look into it, made of operators and kernels in Triton.

        None: to the compiler it is one operator that it knows nothing of.
        """

    def bind(self, namespace: str, device_type: str) -> None:
        """Make it the kernel of `torch.ops.<namespace>.<op>` on such devices, building it first.

        Raises BuildError if it should build and does not.
        """


@dataclass(frozen=True)
class KernelSource:
    """What computes an op on devices that need not be here, and where it was seen to.

    Attributes:
        op, implementation: what it is.
        source: a digest of what it is made from.
        ran: on which device this very source ran, or that it never did.
        checks: what else was seen of it on this machine, such as "interpreted" or "fits sm_90".
    """

    op: str
    implementation: str
    source: str
    ran: str
    checks: tuple[str, ...] = ()


@runtime_checkable
class OpTools(Protocol):
    """What a package of implementations adds to `ds ops`; registered under `ds_core.op_tools`."""

    def version(self) -> str:
        """Changes with what its implementations are made from; findings of checks carry it."""

    def folder(self) -> Path:
        """Where it keeps what it builds; `ds ops check` keeps its findings there too.

        Raises BuildError if there is no such folder.
        """

    def facts(self) -> Mapping[str, str]:
        """What its implementations depend on here, by name: compilers, limits. Builds nothing."""

    def kernels(self) -> Sequence[KernelSource]:
        """The kernels for devices that builds and tests do without; imports none of them."""

    def build(
        self, architectures: Sequence[str], *, everything: bool, into_package: bool
    ) -> Sequence[str]:
        """Build now what would be built at first use; a line for each thing that was made.

        Args:
            architectures: to build for; empty: this machine's.
            everything: also what this machine would not use.
            into_package: beside the package's own files, from where it goes into a wheel.

        Raises BuildError for what cannot be built.
        """

    def benchmarks(self) -> Sequence[str]:
        """The families that `bench` measures here."""

    def unmeasured(self) -> Mapping[str, str]:
        """The families that `bench` cannot measure here, each with why."""

    def bench(self, families: Sequence[str], *, seconds: float, only: str, as_json: bool) -> bool:
        """Measure and print families; whether every target was reached.

        Args:
            seconds: per row.
            only: rows of ops whose name contains it.
        """
