"""quantize and dequantize: every implementation against the reference, and what users see."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestQuantizeBlocks(OpContract):
    op = "quantize_blocks"


class TestQuantizeFeedback(OpContract):
    op = "quantize_feedback_"


class TestDequantizeBlocks(OpContract):
    op = "dequantize_blocks"


class TestQuantizedReduce(OpContract):
    op = "quantized_reduce"
    compiled = False


class TestQuantizedReduceFeedback(OpContract):
    op = "quantized_reduce_feedback_"
    compiled = False
