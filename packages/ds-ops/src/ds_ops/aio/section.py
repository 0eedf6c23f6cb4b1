"""The `aio` section of the config, and the engine that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ds_core.config import Only, Section
from ds_ops.aio.engine import AsyncIO

_NO_GDS = (
    "ds-ops has no path through GPUDirect Storage yet; tensors of a GPU go through pinned memory; "
    "remove the key"
)


class AioSection(Section):
    """How files of offloaded state are read and written: DeepSpeed's keys, and `engine`."""

    removed: ClassVar[Mapping[str, str]] = {
        "thread_count": "documented by DeepSpeed but never a key of its code; use "
        "intra_op_parallelism",
    }

    block_size: int = Field(
        default=1 << 20,
        json_schema_extra={"unit": "bytes"},
        ge=4096,
        le=1 << 30,
        description="A request is cut into transfers of about so many bytes.",
    )
    queue_depth: int = Field(
        default=8,
        json_schema_extra={"unit": "transfers"},
        ge=1,
        le=512,
        description="Transfers in flight at most, per unit of intra_op_parallelism.",
    )
    intra_op_parallelism: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Multiplies queue_depth. The engine io_uring needs one thread for all of it; "
        "the engine threads has one thread per transfer in flight, 64 at most.",
    )
    single_submit: bool = Field(
        default=False,
        description="Makes no difference: transfers reach the kernel as soon as there is room, "
        "in one call for all that there are, and results are the same either way.",
    )
    overlap_events: bool = Field(
        default=True,
        description="Makes no difference: completions are always taken while others are under "
        "way, and results are the same either way.",
    )
    use_gds: Annotated[bool, Only(False, because=_NO_GDS)] = Field(
        default=False, description="Only false: tensors of a GPU go through pinned memory."
    )
    engine: Literal["auto", "io_uring", "threads"] = Field(
        default="auto",
        description='Not of DeepSpeed. "auto": io_uring where the kernel permits it, else threads; '
        "a name: that one, or an error that says why not.",
    )


def open_engine(section: AioSection | None = None) -> AsyncIO:
    """The engine that an `aio` section asks for; without one, by the section's defaults.

    Raises OpError if the engine that it names cannot run here.
    """
    asked = section or AioSection()
    depth = asked.queue_depth * asked.intra_op_parallelism
    return AsyncIO(
        asked.engine,
        queue_depth=min(depth, 4096),
        block_bytes=asked.block_size,
        threads=min(depth, 64),
    )
