"""A process in which Triton interprets its kernels, one for all tests of a session."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


class Interpreter:
    """The process of `interpreter_worker.py`, started at the first question."""

    def __init__(self):
        self._process = None

    def check(self, op):
        """What came of the tests of an op, as the worker tells it."""
        process = self._process = self._process or self._start()
        process.stdin.write(json.dumps({"op": op}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"{op}: the interpreter's process ended with {process.wait()}"
        return json.loads(line)

    def _start(self):
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, str(HERE / "interpreter_worker.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        )  # fmt: skip

    def close(self):
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def interpreter():
    found = Interpreter()
    yield found
    found.close()
