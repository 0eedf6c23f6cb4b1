"""Who moves tensors between memory and files while the program does something else."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch


class Transfer(Protocol):
    """A read or write under way; it keeps its tensor's memory alive."""

    def wait(self) -> int:
        """Wait until it is over; the number of bytes moved. Raises OSError if it failed."""
        ...

    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        ...


class TensorFile(Protocol):
    """An open file. Transfers that overlap have no order among each other."""

    def read(self, tensor: torch.Tensor, offset: int = 0) -> Transfer:
        """Begin to fill a contiguous CPU tensor with the bytes from `offset` on."""
        ...

    def write(self, tensor: torch.Tensor, offset: int = 0) -> Transfer:
        """Begin to write a contiguous CPU tensor's bytes from `offset` on."""
        ...

    def preallocate(self, size: int) -> None:
        """Reserve space so that the file has at least `size` bytes. Raises OSError if full."""
        ...

    def close(self) -> None:
        """Wait for what is under way, and close."""
        ...

    @property
    def why_buffered(self) -> str | None:
        """Why transfers go through the page cache; None if whole pages go around it."""
        ...


@runtime_checkable
class TensorFiles(Protocol):
    """Opens files whose transfers share one bound on what is in flight.

    Attributes:
        name: of the engine, as a report prints it.
    """

    name: str

    def open(self, path: str) -> TensorFile:
        """Open a file for reading and writing; it is created, and what it holds is kept."""
        ...

    def empty(self, size: int) -> torch.Tensor:
        """`[size]` bytes of CPU memory that transfers take as it is, not initialized."""
        ...

    def close(self) -> None:
        """End its threads. Files must be closed before."""
        ...


class TensorFilesFactory(Protocol):
    """What an entry point of the group `ds_core.tensor_files` is."""

    def __call__(self) -> TensorFiles:
        """An engine with settings that suit most disks."""
        ...
