"""Every kernel for GPUs on a GPU: the reference, races, CUDA graphs, torch.compile.

`nox -s gpu` writes down which sources passed: `ds ops report` tells of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ds_core import ops
from ds_core.ops.adam8bit_step import encoded
from ds_core.ops.arguments import randn
from ds_core.ops.checking import comparable
from ds_core.testing.contracts import OpContract
from ds_ops import gpu_runs
from ds_ops.gpu_runs import GpuKernel
from ds_ops.implementations import TORCH

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

#: A race shows as a result that is not the same in every run.
REPEATS = 20


class OnGpu(OpContract):
    """An op by one of its kernels, on a GPU."""

    devices = ("cuda",)

    def __init__(self, kernel):
        self.kernel, self.op = kernel, kernel.op
        self.implementations = (kernel.implementation,)

    def first(self):
        """A case of the widest option, and what computes it."""
        return list(self._cells())[-1][1:]


@pytest.fixture(scope="module")
def passed():
    """What passed everything; written down in the end, if there is a place for it."""
    found = dict.fromkeys(gpu_runs.kernels(), 0)
    yield found
    folder = os.environ.get("DS_GPU_RESULTS")
    whole = [kernel for kernel, tests in found.items() if tests == 4]
    if folder and whole:
        gpu_runs.record(whole, torch.cuda.get_device_name(), Path(folder))


@pytest.fixture(params=gpu_runs.kernels(), ids=lambda kernel: kernel.key)
def contract(request):
    return OnGpu(request.param)


@pytest.mark.parametrize(
    "op", sorted(name for name, row in TORCH.items() if not row.devices or "cuda" in row.devices)
)
def test_torchs_own_kernels_compute_what_the_reference_does(op):
    """Which are asked for by operators that no document promises."""
    contract = OnGpu(GpuKernel(op, "torch", ""))
    if not list(contract._cells()):
        pytest.skip("it takes none of the cases on this GPU")
    contract.test_results_equal_the_reference()
    if ops.get(op).autograd is not None:
        contract.test_gradients_equal_the_reference()


def tensors(value):
    flat = value if isinstance(value, list | tuple) else [value]
    return [t for t in flat if torch.is_tensor(t)]


def copies(args):
    return [a.clone() if torch.is_tensor(a) else a for a in args]


def test_it_computes_what_the_reference_does(contract, passed):
    contract.test_results_equal_the_reference()
    if ops.get(contract.op).autograd is not None:
        contract.test_gradients_equal_the_reference()
    contract.test_bad_arguments_are_refused_by_name()
    passed[contract.kernel] += 1


def test_it_computes_the_same_every_time(contract, passed):
    compute, args = contract.first()
    before = None
    for _ in range(REPEATS):
        own = copies(args)
        found = [*tensors(compute(*own)), *tensors(own)]
        if before is not None:
            assert all(
                torch.equal(comparable(one), comparable(other))
                for one, other in zip(found, before, strict=True)
            )
        before = found
    passed[contract.kernel] += 1


def test_a_graph_replays_it(contract, passed):
    compute, args = contract.first()
    direct = copies(args)
    expected = [*tensors(compute(*direct)), *tensors(direct)]
    own = copies(args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = tensors(compute(*own))
    for mine, given in zip(tensors(own), tensors(list(args)), strict=True):
        mine.copy_(given)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip([*found, *tensors(own)], expected, strict=True):
        assert torch.equal(comparable(one), comparable(other))
    passed[contract.kernel] += 1


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_compiled_it_is_the_same(contract, passed):
    _, args = contract.first()

    def call(*values):
        return ops.run(contract.op, *values, impl=contract.kernel.implementation)

    direct, own = copies(args), copies(args)
    expected = [*tensors(call(*direct)), *tensors(direct)]
    found = [*tensors(torch.compile(call, fullgraph=True)(*own)), *tensors(own)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    passed[contract.kernel] += 1


@pytest.mark.parametrize("seed", [None, 5])
def test_eight_bit_codes_are_the_references(seed):
    """But for a number beside a boundary, which a fused multiply-add may move to its other side."""
    numel, device = 100_003, torch.device("cuda")
    mean, square = (randn(device, torch.float32, numel, seed=s) for s in (3, 4))
    state = (*encoded(mean, signed=True), *encoded(square.square(), signed=False))
    param, grad = (randn(device, torch.float32, numel, seed=s) for s in (1, 2))
    found = []
    for impl in ("triton", "reference"):
        own = copies((param, grad, *state))
        rates = (1e-2, 0.9, 0.999, 1e-8, 0.01, 3, True, seed)
        ops.run("adam8bit_step_", *own, None, None, *rates, impl=impl)
        found.append(own)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for index in (2, 4):
        differ = (found[0][index].int() - found[1][index].int()).abs()
        assert int(differ.max()) <= 1
        assert int(differ.sum()) <= numel // 10_000
    for index in (3, 5):
        torch.testing.assert_close(found[0][index], found[1][index], rtol=1e-6, atol=0)
