"""Building a model whose full weights never exist on one rank.

Inside `Init`, every module hands its parameters over as soon as its parent adopts it: each
rank keeps 1/N of each. What then touches a parameter (`model.apply(init_weights)`, loading
weights, resizing embeddings) finds it whole: it is gathered on touch and sharded again when
the next one is touched. So any initialisation code works, and with equal seeds on all ranks the
values are those of the unsharded build, bit for bit.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ds_core import comm
from ds_zero.errors import ShardError
from ds_zero.released import released
from ds_zero.sharded_param import hide, is_sharded, show

_RECORD = "_ds_init"


class _Record:
    """This rank's part of one parameter that is not in a unit yet."""

    _made: ClassVar[itertools.count[int]] = itertools.count()

    def __init__(self, owner: Init, param: nn.Parameter) -> None:
        self.owner = owner
        #: Position among all parameters that this process ever took: the same on all ranks.
        self.index = next(self._made)
        #: How many `GatheredParameters` keep it whole.
        self.holders = 0
        self.shape, self.numel, self.device = param.shape, param.numel(), param.device
        group = owner.group
        self.size = -(-self.numel // group.size) if self.numel else 0
        self.part = owner.new_part(self.size, owner.dtype_of(param), param.device)

    @property
    def start(self) -> int:
        """Flat index of this rank's first element."""
        return min(self.owner.group.rank * self.size, self.numel)

    @property
    def own(self) -> torch.Tensor:
        """This rank's elements, without the padding."""
        return self.part[: max(0, min(self.size, self.numel - self.start))]

    def store(self, value: torch.Tensor) -> None:
        """Keep this rank's part of the full value."""
        self.own.copy_(value.detach().reshape(-1)[self.start : self.start + self.own.numel()])

    def gather(self) -> torch.Tensor:
        """The full value. Collective."""
        group = self.owner.group
        whole = torch.empty(self.size * group.size, dtype=self.part.dtype, device=self.device)
        comm.all_gather(whole, self.part.to(self.device), group, caller="Init")
        return whole[: self.numel].view(self.shape)


class Init:
    """Context manager under which a model is built sharded.

        with ds_zero.Init():
            model = Transformer(config)
        optimizer = ds_zero.shard(model, torch.optim.AdamW(model.parameters()), stage=3)

    Args:
        mesh: ranks to shard over along "dp"; default: all.
        dtype: parameters are kept in this floating dtype; default: as built.
        enabled: if False, do nothing.
        live_parameters: how many touched parameters may be whole at a time, at least.
        empty: parameters are made without values, and initialisation code has no effect on them,
            so that building costs no time; `load_pretrained` or a checkpoint gives them theirs.
            Until then they are NaN. Buffers are built as ever.
        device: parameters are moved there; default: they stay where they are built.
        on_host: each rank's part waits in host memory, page-locked beside a GPU, until the model
            is sharded.
        from_rank0: values are those of rank 0, also what is made of them later, so that the
            ranks' random seeds may differ; costs a broadcast whenever a parameter is sharded.

    After the block the model is ready for `ds_zero.shard(..., stage=1|2|3)`. Until then each use of
    a parameter gathers it alone, on all ranks: right, but slow. Collective: all ranks build the
    same model, with the same random seed if its values are to agree.
    """

    def __init__(
        self,
        *,
        mesh: comm.Mesh | None = None,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        live_parameters: int = 2,
        empty: bool = False,
        device: torch.device | str | None = None,
        on_host: bool = False,
        from_rank0: bool = False,
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ShardError(f"Init: dtype must be a floating one, got {dtype}")
        self._mesh, self._dtype, self._enabled = mesh, dtype, enabled
        self._max_live = max(1, live_parameters)
        self._live: OrderedDict[int, nn.Parameter] = OrderedDict()
        self._roots: dict[nn.Module, None] = {}
        self._empty, self._on_host, self._from_rank0 = empty, on_host, from_rank0
        self._device = None if device is None else torch.device(device)
        self._devices: dict[int, tuple[nn.Parameter, torch.device]] = {}
        self._hooks: list[Any] = []
        self._group: comm.Group | None = None

    #: `Keeper`: whoever touches a parameter finds it whole, at any time.
    detaches_later = values_stay = True

    @property
    def group(self) -> comm.Group:
        if self._group is None:
            mesh = comm.Mesh.world() if self._mesh is None else self._mesh
            self._group = mesh.group("dp")
        return self._group

    def dtype_of(self, param: torch.Tensor) -> torch.dtype:
        """The dtype in which a parameter is kept."""
        floating = param.dtype.is_floating_point
        return self._dtype if self._dtype is not None and floating else param.dtype

    def new_part(self, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Room for this rank's part of a parameter that is on `device`; zeros."""
        if not self._on_host:
            return torch.zeros(size, dtype=dtype, device=device)
        pinned = device.type == "cuda"
        return torch.zeros(size, dtype=dtype, device="cpu", pin_memory=pinned)

    def adopt(self, module: nn.Module) -> None:
        """Shard a module that was built without this. Collective."""
        if self._enabled:
            self._take(module)

    def pause(self) -> None:
        """Shard what has been built so far, and let what comes be built as ever until `resume`.

        Inside the block: for a model that is to be trained before its end. Collective.
        """
        for hook in self._hooks:
            hook.remove()
        for module in list(self._roots):
            self._give_storage(module)
            self._take(module)
        self._devices.clear()
        self._roots.clear()
        self._evict(keep=())

    def resume(self) -> None:
        """Undo `pause`."""
        self.__enter__()

    def __enter__(self) -> Init:
        if self._enabled:
            self._hooks = [register_module_module_registration_hook(self._adopted)]
        if self._enabled and self._empty:
            # torch's annotation says that the hook returns nothing; its documentation, what it may.
            self._hooks.append(register_module_parameter_registration_hook(self._emptied))  # type: ignore[arg-type]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._enabled:
            return
        if kind is None:
            self.pause()
        for hook in self._hooks:
            hook.remove()

    def _adopted(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        """A parent registers a finished child: its parameters can go."""
        self._roots[parent] = None
        if child is not None:
            self._roots.pop(child, None)
            self._take(child)

    def _emptied(
        self, module: nn.Module, name: str, param: nn.Parameter | None
    ) -> nn.Parameter | None:
        """A module registers a parameter: a copy without storage, or None to let it be."""
        if param is None or param.is_meta or is_sharded(param) or not param.is_floating_point():
            return None
        self._roots.setdefault(module)
        meta = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
        meta.__dict__.update(param.__dict__)
        self._devices[id(meta)] = meta, param.device
        return meta

    def _give_storage(self, module: nn.Module) -> None:
        """Put the parameters that were emptied onto their device, as NaN that takes no room."""
        for param in module.parameters():
            if id(param) in self._devices:
                device = self._devices.pop(id(param))[1]
                unknown = torch.full((), float("nan"), dtype=param.dtype, device=device)
                twin = nn.Parameter(unknown.expand(param.shape), param.requires_grad)
                twin.__dict__.update(param.__dict__)
                torch.utils.swap_tensors(param, twin)  # whoever holds the parameter keeps it

    def _take(self, module: nn.Module) -> None:
        for param in module.parameters():
            if not hasattr(param, _RECORD) and not param.is_meta and not is_sharded(param):
                if self._device is not None:
                    param.data = param.data.to(self._device)
                record = _Record(self, param)
                if self._empty and 0 in param.stride():
                    record.store(param)  # it has no values yet, the same on all ranks
                else:
                    self._keep(record, param)
                setattr(param, _RECORD, record)
                hide(param, self)
                self.taken(param)

    def taken(self, param: nn.Parameter) -> None:
        """A parameter has been sharded: for subclasses that note something about it."""

    def _keep(self, record: _Record, param: nn.Parameter) -> None:
        """Keep this rank's part of what `param` holds now; of what rank 0's holds, if so told."""
        value = param.detach()
        if self._from_rank0:
            value = value.contiguous()
            comm.broadcast(value, self.group, caller="Init")
        record.store(value)

    def hold(self, params: Iterable[nn.Parameter]) -> None:
        """Make parameters whole until `let_go`, whatever else is touched. Collective."""
        for param in params:
            record: _Record = getattr(param, _RECORD)
            if record.holders == 0:
                if self._live.pop(id(param), None) is not None and not is_sharded(param):
                    self._keep(record, param)
                show(param, record.gather())
            record.holders += 1

    def let_go(self, params: Iterable[nn.Parameter]) -> None:
        """Shard again what nobody else holds; edits are lost unless they were stored."""
        for param in params:
            record = record_of(param)
            if record is None:
                continue  # it has joined a unit meanwhile
            record.holders -= 1
            if record.holders == 0:
                hide(param, self)

    def touch(self, params: list[nn.Parameter], operation: str) -> None:
        """Make `params` whole for `operation`, and shard others again (Keeper protocol)."""
        for param in params:
            show(param, getattr(param, _RECORD).gather())
            self._live[id(param)] = param
        self._evict(keep=tuple(id(param) for param in params))

    def settle(self) -> None:
        """Shard again whatever was touched, so that each rank's part is what counts."""
        self._evict(keep=())

    def _evict(self, keep: tuple[int, ...]) -> None:
        limit = max(self._max_live, len(keep)) if keep else 0
        for key in [key for key in self._live if key not in keep]:
            if len(self._live) <= limit:
                return
            param = self._live.pop(key)
            record = getattr(param, _RECORD, None)
            if record is not None and not is_sharded(param):
                self._keep(record, param)
                hide(param, self)


def gathered_value(param: nn.Parameter) -> torch.Tensor:
    """The full value of a parameter, gathered if `Init` sharded it; its record ends here."""
    record: _Record | None = getattr(param, _RECORD, None)
    if record is None:
        return param.detach()
    value = record.gather() if is_sharded(param) else param.detach()
    record.owner._live.pop(id(param), None)
    delattr(param, _RECORD)
    return value


def record_of(param: nn.Parameter) -> _Record | None:
    """The part of `param` that `Init` keeps, until the parameter joins a unit."""
    return getattr(param, _RECORD, None)


def held_bytes(param: nn.Parameter) -> int:
    """Bytes of memory that a parameter has now: all of it, what `Init` keeps, or none."""
    record = record_of(param)
    if record is not None:
        return record.part.nbytes
    if released(param) is not None:
        return 0  # its part goes when a unit takes it over, before that has as much
    return 0 if param.is_meta else param.numel() * param.element_size()
