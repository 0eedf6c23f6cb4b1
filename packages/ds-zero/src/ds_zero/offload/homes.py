"""What all units of one rank share for their offload: streams, files, buffers."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import torch

from ds_core.seams import TensorFile, TensorFiles
from ds_core.tensor_files import open_tensor_files
from ds_zero.errors import ShardError
from ds_zero.holdings import Place
from ds_zero.offload.buffers import BufferPool, whole_pages
from ds_zero.offload.choice import Offload, Tier, is_host
from ds_zero.offload.crossing import Crossing, SideStream
from ds_zero.offload.disk_speed import tell_speed
from ds_zero.offload.shard_home import DiskShard, HostShard, ShardHome
from ds_zero.offload.swap import Swap
from ds_zero.room import Room

logger = logging.getLogger(__name__)


class Homes:
    """Finds a home for the parts of every unit of one rank.

    Args:
        offload: what leaves the device.
        device: on which the model computes.
        rank: in the job, for the names of files.

    Raises ShardError if the folder cannot be written.
    """

    def __init__(self, offload: Offload, device: torch.device, rank: int) -> None:
        self.offload, self._device, self._rank = offload, device, rank
        self._side: SideStream | None = None
        self._files: TensorFiles | None = None
        self._shard_file: TensorFile | None = None
        self._shard_end = self._numel_in_cpu = 0
        self._disk_shards: list[DiskShard] = []
        self._shard_pool: BufferPool | None = None
        self._told_buffered: set[str | None] = set()
        self.swap: Swap | None = None
        if offload.optimizer == "nvme":
            self.swap = Swap(
                self._open("states", offload.folder), BufferPool(self.files, offload.buffers)
            )

    @property
    def leaves_device(self) -> bool:
        """Whether "cpu" is another memory than the device's."""
        return not is_host(self._device)

    @property
    def near(self) -> Place:
        """Where the device's tensors are."""
        return "device" if self.leaves_device else "host"

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers that transfers to and from disk share."""
        shards = 0 if self._shard_pool is None else self._shard_pool.nbytes
        return shards + (0 if self.swap is None else self.swap.buffer_bytes)

    @property
    def side(self) -> SideStream:
        """What copies between device and host."""
        if self._side is None:
            self._side = SideStream(self._device)
        return self._side

    @property
    def files(self) -> TensorFiles:
        """What opens files."""
        if self._files is None:
            self._files = open_tensor_files()
        return self._files

    def crossing(self, states: Tier, numel: int, grad_dtype: torch.dtype) -> Crossing | None:
        """The host's side of a unit's states; None where there is nothing to cross."""
        if states == "device" or not self.leaves_device:
            return None
        return Crossing(numel, grad_dtype, self.side, pin=self.offload.pin_memory)

    def shards_leave(self) -> bool:
        """Whether any shard of parameters has a home of its own."""
        tier = self.offload.parameters
        return tier == "nvme" or (tier == "cpu" and self.leaves_device)

    def shard_home(self, shard: torch.Tensor) -> ShardHome | None:
        """A home for a unit's shard, which holds its first values; None: it stays."""
        if not self.shards_leave():
            return None
        numel = shard.numel()
        in_cpu = self.offload.parameters == "cpu"
        if self.offload.parameters == "nvme":
            in_cpu = self._numel_in_cpu + numel <= self.offload.max_numel_in_cpu
            self._numel_in_cpu += numel if in_cpu else 0
        if in_cpu and not self.leaves_device:
            return None
        if in_cpu:
            return HostShard(shard, self.side, pin=self.offload.pin_memory)
        return self._on_disk(shard)

    def _on_disk(self, shard: torch.Tensor) -> DiskShard:
        if self._shard_file is None or self._shard_pool is None:
            self._shard_file = self._open("parameters", self.offload.folder_of_parameters)
            self._shard_pool = BufferPool(self.files, self.offload.parameter_buffers)
        offset, self._shard_end = self._shard_end, self._shard_end + whole_pages(shard.nbytes)
        self._shard_file.preallocate(self._shard_end)
        home = DiskShard(shard, self._shard_file, offset, self._shard_pool)
        self._disk_shards.append(home)
        return home

    def open_parking(self, folder: str | None) -> TensorFile:
        """A file for state that is parked; by default beside the other files."""
        chosen = folder or self.offload.folder or self.offload.folder_of_parameters
        if chosen is None:
            raise ShardError(
                'offload_states: device="nvme" needs a folder on that disk: pass folder=, or shard '
                "with Offload(folder=...), in a config nvme_path"
            )
        return self._open("parked", chosen)

    def _open(self, what: str, where: str | None) -> TensorFile:
        """A file that nobody else can find, and that is gone when the process ends."""
        folder = Path(where or "")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"ds_zero_{what}_rank{self._rank}_{uuid.uuid4().hex[:12]}.swap"
            file = self.files.open(str(path))
            os.unlink(path)
        except OSError as error:
            raise ShardError(
                f"offload: folder {str(folder)!r}: {error}; give a folder (nvme_path) on the disk "
                f"that this process may write to"
            ) from error
        if file.why_buffered is not None and where not in self._told_buffered:
            self._told_buffered.add(where)
            logger.warning(
                "offload: folder %r: transfers go through the page cache, which takes memory and "
                "time: %s",
                str(folder),
                file.why_buffered,
            )
        return file

    def tell_speed(self, swap_files: Iterable[tuple[str, int]], room: Room) -> None:
        """Log how fast each folder's disk is; `swap_files` are (folder, bytes) that will be."""
        for folder, nbytes in dict(swap_files).items():
            probe = self._open("probe", folder)
            try:
                tell_speed(self.files, probe, folder, nbytes, room)
            finally:
                probe.close()

    def expect(self, weights: Iterable[torch.Tensor]) -> None:
        """A step updates these optimizer pieces, in this order: those on disk are read ahead."""
        if self.swap is not None:
            self.swap.expect([each for each in weights if each in self.swap])

    def read_one_more(self, weights: Iterable[torch.Tensor]) -> None:
        """A step will update these, in this order: one more of those on disk is read ahead."""
        swap = self.swap
        if swap is not None:
            swap.read_one_more(each for each in weights if each in swap)

    def swap_bytes(self) -> tuple[int, int]:
        """Bytes read from and written to disk so far: states and parameters."""
        read = sum(home.bytes_read for home in self._disk_shards)
        written = sum(home.bytes_written for home in self._disk_shards)
        if self.swap is not None:
            read, written = read + self.swap.bytes_read, written + self.swap.bytes_written
        return read, written

    @property
    def torn(self) -> str | None:
        """Why values that should be on disk are not: the first write that failed; None if none."""
        pools = [self._shard_pool, None if self.swap is None else self.swap.pool]
        for pool in pools:
            for staging in () if pool is None else tuple(pool.failed):
                return f"what was written to disk is lost: {staging.error}"
        return None

    def settle(self) -> None:
        """Wait for what is being written. Raises the OSError of what failed."""
        for home in self._disk_shards:
            home.settle()
        if self.swap is not None:
            self.swap.settle()

    def end_training(self) -> None:
        """Give up the states on disk; parts of parameters stay where they are."""
        if self.swap is not None:
            self.swap.close()
            self.swap = None

    def close(self) -> None:
        """Wait for what is under way, and close the files; what they held is gone."""
        for home in self._disk_shards:
            home.close()
        if self._shard_file is not None:
            self._shard_file.close()
        if self.swap is not None:
            self.swap.close()
        if self._files is not None:
            self._files.close()
