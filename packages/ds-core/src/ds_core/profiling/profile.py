"""What a profile holds: a tree of modules with their parameters, operations and times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModuleProfile:
    """One module with everything below it.

    Attributes:
        name: qualified name; "" for the model itself.
        kind: name of its class.
        parameters: elements of its parameters, tied ones once, sharded ones whole.
        calls: forwards, without recomputations.
        forward_flops, recompute_flops, backward_flops: floating-point operations of matrix
            products, a multiply and its add being two.
        elementwise_flops: elements that all other arithmetic went through, in all phases.
        forward_s, recompute_s: seconds within its calls.
        backward_s: seconds in the operations of its backward, without recomputation.
        children: its submodules, each under the first of its names.
    """

    name: str
    kind: str
    parameters: int
    calls: int
    forward_flops: int
    recompute_flops: int
    backward_flops: int
    elementwise_flops: int
    forward_s: float
    recompute_s: float
    backward_s: float
    children: tuple[ModuleProfile, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward."""
        return self.forward_flops // 2

    @property
    def flops(self) -> int:
        """Operations of forward, recomputation and backward together."""
        return self.forward_flops + self.recompute_flops + self.backward_flops

    def walk(self, depth: int = 0) -> Iterator[tuple[int, ModuleProfile]]:
        """This module and all below it, each with its depth, parents first."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)


@dataclass(frozen=True)
class Profile:
    """What a model did while a profiler watched.

    Attributes:
        model: the tree of its modules.
        outside: what was done in no module, such as a loss computed after the forward.
        forward_s: seconds in the model's own calls, or between start and stop where it had none.
        backward_s: seconds of whole backwards, recomputation included.
        uncounted: operations of other libraries for which no formula is known, by name, with
            their calls; `torch.utils.flop_counter.register_flop_formula` adds one.
    """

    model: ModuleProfile
    outside: ModuleProfile
    forward_s: float
    backward_s: float
    uncounted: Mapping[str, int] = field(default_factory=dict)

    @property
    def forward_flops(self) -> int:
        return self.model.forward_flops + self.outside.forward_flops

    @property
    def recompute_flops(self) -> int:
        return self.model.recompute_flops + self.outside.recompute_flops

    @property
    def backward_flops(self) -> int:
        return self.model.backward_flops + self.outside.backward_flops

    @property
    def flops(self) -> int:
        """All operations that were counted."""
        return self.model.flops + self.outside.flops

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward."""
        return self.forward_flops // 2

    @property
    def parameters(self) -> int:
        return self.model.parameters

    def find(self, name: str) -> ModuleProfile:
        """The module of that qualified name. Raises KeyError if there is none."""
        for _, module in self.model.walk():
            if module.name == name:
                return module
        raise KeyError(f"no module is called {name!r}; {self.model.kind} is the model, called ''")

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dicts and lists, for JSON."""
        return asdict(self)

    def text(self, *, module_depth: int = -1, top_modules: int = 1, detailed: bool = True) -> str:
        """The profile as `ds_core.profiling.report` writes it, for people."""
        from ds_core.profiling.report import written

        return written(self, module_depth=module_depth, top_modules=top_modules, detailed=detailed)
