"""Runs the tests of ops on their Triton kernels in Triton's interpreter: a line in, a line out.

A process of its own, for Triton reads TRITON_INTERPRET when it is imported. In: {"op": name}. Out:
{"cases": how many calls, "slowest": seconds of the processor for one, "problems": by test}.
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
from more_cases import MORE

from ds_core.errors import OpError
from ds_core.testing.contracts import OpContract
from ds_ops.implementations import Triton
from ds_ops.triton_kernels import checked

TESTS = (
    "test_results_equal_the_reference",
    "test_gradients_equal_the_reference",
    "test_bad_arguments_are_refused_by_name",
    "test_a_tensor_on_another_device_is_refused",
)


class Interpreted(OpContract):
    """An op by its Triton kernel; notes how long each call takes."""

    implementations = ("triton",)

    def __init__(self, op):
        self.op = op
        self.seconds = []

    def cases(self, device, dtype):
        return [*super().cases(device, dtype), *MORE.get(self.op, lambda *_: [])(device, dtype)]

    def test_a_tensor_on_another_device_is_refused(self):
        """Which a GPU would read as if it were its own."""
        args = self.cases(torch.device("cpu"), self._op().dtypes[0])[0]
        places = [i for i, each in enumerate(args) if torch.is_tensor(each)]
        kernel = Triton(self.op)._function()
        for place in places if len(places) > 1 else []:
            with pytest.raises(OpError):
                kernel(*args[:place], args[place].to("meta"), *args[place + 1 :])

    def _runnable(self, device):
        return [(name, self._timed(compute)) for name, compute in super()._runnable(device)]

    def _timed(self, compute):
        def call(*args):
            begin = time.process_time()
            try:
                return compute(*args)
            finally:
                self.seconds.append(time.process_time() - begin)

        return call


def check(name):
    """What came of every test of an op."""
    contract, problems = Interpreted(name), {}
    for test in TESTS:
        try:
            getattr(contract, test)()
        except pytest.skip.Exception:
            continue
        except Exception:
            problems[test] = traceback.format_exc(limit=-6)
    if not problems:
        checked.mark_interpreted(name)
    calls = contract.seconds[1:]  # the first imports what the kernel needs
    return {"cases": len(calls), "slowest": max(calls, default=0.0), "problems": problems}


def main():
    warnings.simplefilter("ignore")  # numpy's own, of overflows that a GPU does not mention
    interpreter_bf16.mend()
    for line in sys.stdin:
        print(json.dumps(check(json.loads(line)["op"])), flush=True)


if __name__ == "__main__":
    main()
