"""Run by `test_imports.py` in a fresh interpreter: what does importing one module do?

Prints JSON. torch is imported before anything is measured: the cost meant is that on top of it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping

FORBIDDEN = ("triton", "transformers", "rich", "matplotlib", "typer", "pydantic")
STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec", "os.system")
STARTS += ("_thread.start_new_thread", "socket.connect", "socket.bind", "ctypes.dlopen")


class Recording(MutableMapping[str, str]):
    """The environment, noting which variables are looked up and from which file."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._environ = environ
        self.reads: list[str] = []

    def _note(self, what: str) -> None:
        frame = sys._getframe(2)
        while frame.f_back and os.path.basename(frame.f_code.co_filename) in _PASS_ON:
            frame = frame.f_back
        self.reads.append(f"{what} by {frame.f_code.co_filename}:{frame.f_lineno}")

    def __getitem__(self, key: str) -> str:
        self._note(key)
        return self._environ[key]

    def __setitem__(self, key: str, value: str) -> None:
        self._note(f"write of {key}")
        self._environ[key] = value

    def __delitem__(self, key: str) -> None:
        self._note(f"removal of {key}")
        del self._environ[key]

    def __iter__(self) -> Iterator[str]:
        self._note("all")
        return iter(self._environ)

    def copy(self) -> dict[str, str]:
        self._note("all")
        return dict(self._environ)

    def __len__(self) -> int:
        return len(self._environ)


# Files whose lookups are on behalf of their caller: os.getenv, Mapping.get, this file.
_PASS_ON = {"os.py", "_collections_abc.py", "<frozen os>", "<frozen _collections_abc>"}
_PASS_ON.add(os.path.basename(__file__))


def main(module: str) -> None:
    """Import `module` and print what that took and did."""
    for name in FORBIDDEN:
        sys.modules[name] = None  # type: ignore[assignment] - importing it is now an error
    begin = time.perf_counter()
    import torch

    torch_seconds = time.perf_counter() - begin
    # A full collection of garbage takes long with torch's objects, and falls on whoever is next.
    gc.collect()
    gc.freeze()
    started: list[str] = []
    sys.addaudithook(lambda event, args: started.append(event) if event in STARTS else None)
    recording = Recording(os.environ)
    os.environ = recording  # type: ignore[assignment] # noqa: B003 - the point is to see lookups
    before, threads = set(sys.modules), threading.active_count()
    begin = time.perf_counter()
    importlib.import_module(module)
    seconds = time.perf_counter() - begin
    os.environ = recording._environ  # type: ignore[assignment] # noqa: B003
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "torch_seconds": torch_seconds,
                "modules": sorted(set(sys.modules) - before),
                "environment": recording.reads,
                "started": started,
                "threads": threading.active_count() - threads,
                "process_group": distributed,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
