"""The profiler itself: watches a model inside a `with` block and then has its profile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import nn

from ds_core.accelerator import Accelerator
from ds_core.errors import DsError
from ds_core.profiling.calls import OUTSIDE, Calls, Phase
from ds_core.profiling.counter import OpCounter, Work
from ds_core.profiling.profile import ModuleProfile, Profile


class FlopsProfiler:
    """Counts the operations of a model, by module, while its block runs.

        with FlopsProfiler(model) as profiler:
            model(batch).mean().backward()
        print(profiler.profile().text())

    Results are those of a run without it, bit by bit: no function of torch is replaced, and no
    tensor is touched. It sees each operation as torch dispatches it, which costs time in Python,
    and it waits for the device at the edges of each module: times are shares, not records. Modules
    under `torch.compile` run uncompiled meanwhile.

    Args:
        model: whose modules are told apart.
        ignore: classes of modules whose work and parameters, and those below, are left out.
    """

    def __init__(self, model: nn.Module, *, ignore: Sequence[type[nn.Module]] = ()) -> None:
        self._model = model
        self._ignored = tuple(ignore)
        device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self._synchronize: Callable[[], None] = Accelerator(device.type).synchronize
        modules = list(dict.fromkeys(model.modules()))
        self._index = {module: index for index, module in enumerate(modules)}
        self._calls = Calls(modules, self._synchronize)
        self._counter = OpCounter(self._calls, device)
        self._began_s = self._elapsed_s = 0.0
        self._runs = False

    def start(self) -> None:
        """Begin to watch; what `with` does. Several stretches add up."""
        if self._runs:
            raise DsError("FlopsProfiler.start: it runs already; stop it first")
        self._synchronize()
        self._calls.start()
        self._counter.__enter__()
        self._began_s = time.perf_counter()
        self._runs = True

    def stop(self) -> None:
        """Stop watching, and leave nothing behind. Does nothing if it does not run."""
        if not self._runs:
            return
        self._runs = False
        self._synchronize()
        self._elapsed_s += time.perf_counter() - self._began_s
        self._counter.__exit__(None, None, None)
        self._calls.stop()

    def __enter__(self) -> FlopsProfiler:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def profile(self) -> Profile:
        """What was seen so far."""
        tree = self._tree(self._model, "", set())
        if tree is None:
            raise DsError(
                f"FlopsProfiler: the model itself is a {type(self._model).__name__}, which is one "
                f"of the classes to ignore; leave it out of them"
            )
        backward_s = self._counter.backward_s
        forward_s = tree.forward_s if tree.calls else self._elapsed_s - backward_s
        work = self._counter.work.get(OUTSIDE, Work())
        return Profile(
            model=tree,
            outside=_told(work, "(outside the model)", ""),
            forward_s=forward_s,
            backward_s=backward_s,
            uncounted=dict(self._counter.uncounted),
        )

    def _tree(self, module: nn.Module, name: str, seen: set[nn.Module]) -> ModuleProfile | None:
        """A module with those below it that no earlier part of the tree has shown already."""
        if module in seen or module not in self._index or isinstance(module, self._ignored):
            return None
        seen.add(module)
        children = []
        for key, child in module.named_children():
            found = self._tree(child, f"{name}.{key}" if name else key, seen)
            if found is not None:
                children.append(found)
        index = self._index[module]
        return _told(
            self._counter.work.get(index, Work()),
            name,
            type(module).__name__,
            parameters=self._parameters(module),
            calls=self._calls.counts[Phase.FORWARD][index],
            seconds={phase: self._calls.seconds[phase][index] for phase in Phase},
            children=tuple(children),
        )

    def _parameters(self, module: nn.Module) -> int:
        found: dict[int, int] = {}
        pending = [module]
        while pending:
            current = pending.pop()
            if not isinstance(current, self._ignored):
                own = current.parameters(recurse=False)
                found.update((id(parameter), parameter.numel()) for parameter in own)
                pending.extend(current.children())
        return sum(found.values())


def _told(
    work: Work,
    name: str,
    kind: str,
    *,
    parameters: int = 0,
    calls: int = 0,
    seconds: dict[Phase, float] | None = None,
    children: tuple[ModuleProfile, ...] = (),
) -> ModuleProfile:
    """A module's own work and that of its children together."""
    own_s = seconds or dict.fromkeys(Phase, 0.0)

    def within(phase: Phase, below: float) -> float:
        # A container that is never called itself (a ModuleList) lasts as long as what is in it.
        return own_s[phase] or below

    return ModuleProfile(
        name=name,
        kind=kind,
        parameters=parameters,
        calls=calls,
        forward_flops=work.flops[Phase.FORWARD] + sum(c.forward_flops for c in children),
        recompute_flops=work.flops[Phase.RECOMPUTE] + sum(c.recompute_flops for c in children),
        backward_flops=work.flops[Phase.BACKWARD] + sum(c.backward_flops for c in children),
        elementwise_flops=sum(work.elements.values()) + sum(c.elementwise_flops for c in children),
        forward_s=within(Phase.FORWARD, sum(c.forward_s for c in children)),
        recompute_s=within(Phase.RECOMPUTE, sum(c.recompute_s for c in children)),
        backward_s=work.seconds + sum(c.backward_s for c in children),
        children=children,
    )
