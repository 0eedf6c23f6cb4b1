"""Commits a fault when a run reaches its point."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch

from ds_core.seams import Event, EventKind
from ds_core.testing.faults.acts import die, fail_open_files, file_size_limit
from ds_core.testing.faults.disks import fill_disk
from ds_core.testing.faults.fault import DAMAGES, Fault

if TYPE_CHECKING:
    from ds_core.engine import Engine

#: Between which events each point lies.
_WINDOWS = {
    "forward": (EventKind.FORWARD_BEGIN, EventKind.FORWARD),
    "backward": (EventKind.BACKWARD_BEGIN, EventKind.BACKWARD),
    "step": (EventKind.UPDATE_BEGIN, EventKind.STEP_END),
}


@dataclass(frozen=True)
class Strike:
    """A fault that has been committed.

    Attributes:
        at_s: when, by the system's monotonic clock, which all processes share.
        where: file, line and function in which the rank was.
        pid: of the rank.
    """

    at_s: float
    where: str
    pid: int

    @classmethod
    def read(cls, path: Path) -> Strike | None:
        """What an injector recorded; None if it has not struck."""
        return cls(**json.loads(path.read_text())) if path.exists() else None


class FaultInjector:
    """An observer that commits a fault on its rank, and does nothing on the others.

    Points are hit to the call: the rank counts the Python functions that it enters in that part of
    training, and strikes at the `nth`. A kill is then a crash at that very place, of native code
    that it calls as well as of Python.

    Args:
        fault: what to commit. None: nothing.
        rank: this process's.
        record: file to which the `Strike` is written just before it.
        fills_disk: whether the checkpoints' file system may be filled up, such as one that
            `small_disk` made; else "full disk" is a limit to the size of the rank's own files.

    Example: `ds_core.initialize(model, config, observers=(FaultInjector(fault, rank=rank),))`.
    """

    def __init__(
        self,
        fault: Fault | None,
        *,
        rank: int,
        record: Path | None = None,
        fills_disk: bool = False,
    ) -> None:
        is_mine = fault is not None and fault.rank == rank and fault.kind not in DAMAGES
        self._fault = fault if is_mine else None
        self._record, self._fills_disk = record, fills_disk
        self._countdown = 0

    def on_event(self, engine: Engine, event: Event) -> None:
        """Called by the engine."""
        fault = self._fault
        if fault is None:
            return
        if event.kind is EventKind.START:
            self._wrap_files(engine, fault)
            if fault.kind == "stuck loader":
                self._wrap_loader(engine, fault)
        elif fault.kind == "swap error":
            if event.kind is EventKind.UPDATE_BEGIN and engine.global_step == fault.step - 1:
                self._fail_swap(fault)
        elif fault.kind == "wrong shape":
            if event.kind is EventKind.FORWARD_BEGIN and engine.global_step == fault.step - 1:
                self._widen_output(engine)
        elif fault.point in _WINDOWS:
            first, last = _WINDOWS[fault.point]
            # The step has been counted when it ends.
            if event.kind is first and engine.global_step == fault.step - 1:
                self._begin(fault.nth)
            elif event.kind is last and self._countdown:
                self._strike()

    # ------------------------------------------------------------------ parts of training

    def _wrap_files(self, engine: Engine, fault: Fault) -> None:
        """Have saving and loading, of this engine alone, be windows of their own."""
        if fault.kind == "full disk":
            engine.save_checkpoint = self._on_full_disk(engine, fault)  # type: ignore[method-assign]
        elif fault.kind == "stopped writer":
            engine.save_checkpoint = self._stopping(engine, fault)  # type: ignore[method-assign]
        elif fault.kind in ("kill", "stop") and fault.point == "save":
            engine.save_checkpoint = self._window(  # type: ignore[method-assign]
                engine.save_checkpoint, lambda: engine.global_step == fault.step, fault.nth
            )
        elif fault.kind in ("kill", "stop") and fault.point == "load":
            engine.load_checkpoint = self._window(  # type: ignore[method-assign]
                engine.load_checkpoint, lambda: True, fault.nth
            )

    def _window(
        self, function: Callable[..., Any], is_due: Callable[[], bool], nth: int
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if is_due():
                self._begin(nth)
            result = function(*args, **kwargs)
            if self._countdown:
                self._strike()
            return result

        return wrapped

    def _begin(self, nth: int) -> None:
        self._countdown = nth + 1
        sys.setprofile(self._count)

    def _count(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._countdown -= 1
            if self._countdown == 0:
                self._strike(frame)

    def _wrap_loader(self, engine: Engine, fault: Fault) -> None:
        loader = engine.dataloader
        assert loader is not None, "a stuck loader needs the engine's own"

        def stuck(batch: Any, difficulties: Any) -> Any:
            if engine.global_step == fault.step - 1:
                self._note(sys._getframe())
                while True:
                    time.sleep(3600)
            return batch

        loader.post_process = stuck

    def _widen_output(self, engine: Engine) -> None:
        def widen(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            self._note(sys._getframe())
            return torch.cat([output, output[-1:]])

        self._fault = None  # one forward only
        engine.module.register_forward_hook(widen)

    def _on_full_disk(self, engine: Engine, fault: Fault) -> Callable[..., Any]:
        save = engine.save_checkpoint

        def wrapped(directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
            if engine.global_step != fault.step:
                return save(directory, *args, **kwargs)
            self._note(sys._getframe())
            before = threading.enumerate()
            with self._full(Path(directory), fault):
                path = save(directory, *args, **kwargs)
                # A thread that it left behind is to meet this disk; what it says is told later.
                for thread in threading.enumerate():
                    if thread not in before:
                        thread.join()
                return path

        return wrapped

    def _fail_swap(self, fault: Fault) -> None:
        self._fault = None  # once
        self._note(sys._getframe())
        on: Literal["read", "write"] = "write" if fault.fraction < 0.5 else "read"
        failed = fail_open_files(".swap", on=on)
        assert failed, "a swap error needs state on disk"

    def _stopping(self, engine: Engine, fault: Fault) -> Callable[..., Any]:
        save = engine.save_checkpoint

        @functools.wraps(save)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if engine.global_step != fault.step:
                return save(*args, **kwargs)
            self._countdown = fault.nth + 1
            threading.setprofile(self._count_in_thread)
            try:
                return save(*args, **kwargs)
            finally:
                threading.setprofile(None)

        return wrapped

    def _count_in_thread(self, frame: FrameType, event: str, argument: Any) -> None:
        """Strike at the `nth` call of a thread, or as it ends."""
        if event == "return" and frame.f_code is threading.Thread.run.__code__:
            self._countdown = 1
        elif event != "call":
            return
        self._countdown -= 1
        if self._countdown == 0:
            self._strike(frame)

    @contextlib.contextmanager
    def _full(self, directory: Path, fault: Fault) -> Iterator[None]:
        newest = max(directory.glob("*/rank_*.safetensors"), key=lambda path: path.stat().st_mtime)
        if self._fills_disk:
            size = sum(path.stat().st_size for path in newest.parent.iterdir())
            fill_disk(directory, int(size * fault.fraction))
            yield
        else:
            with file_size_limit(int(newest.stat().st_size * fault.fraction)):
                yield

    # ------------------------------------------------------------------ the deed

    def _strike(self, frame: FrameType | None = None) -> None:
        sys.setprofile(None)
        self._countdown = 0
        assert self._fault is not None
        self._note(frame or sys._getframe())
        if self._fault.kind == "kill":
            die()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _note(self, frame: FrameType) -> None:
        if self._record is None:
            return
        code = frame.f_code
        where = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
        text = json.dumps(asdict(Strike(time.monotonic(), where, os.getpid())))
        temporary = self._record.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, self._record)
