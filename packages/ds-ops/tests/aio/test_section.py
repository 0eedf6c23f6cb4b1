"""The `aio` section: the original's keys, and the engine made from them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ds_ops.aio.section import AioSection, open_engine


def test_defaults_are_those_of_deepspeed():
    assert AioSection().model_dump() == {
        "block_size": 1048576,
        "queue_depth": 8,
        "intra_op_parallelism": 1,
        "single_submit": False,
        "overlap_events": True,
        "use_gds": False,
        "engine": "auto",
    }


def test_engine_as_the_section_says():
    section = AioSection(block_size=65536, queue_depth=4, intra_op_parallelism=3, engine="threads")
    with open_engine(section) as engine:
        assert (engine.name, engine.queue_depth, engine.block_bytes) == ("threads", 12, 65536)
    with open_engine() as engine:
        assert engine.block_bytes == 1048576
        assert engine.queue_depth == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_gds": True}, "no path through GPUDirect Storage"),
        ({"block_size": 100}, "4096"),
        ({"queue_depth": 0}, "greater than or equal to 1"),
        ({"engine": "libaio"}, "io_uring"),
        ({"thread_count": 2}, "Extra inputs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_values(values, message):
    with pytest.raises(ValidationError, match=message):
        AioSection(**values)


def test_removed_key_says_what_to_use():
    assert "intra_op_parallelism" in AioSection.removed["thread_count"]
