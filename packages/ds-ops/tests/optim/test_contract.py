"""Every step of an optimizer, by every implementation, against its reference."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestAdam(OpContract):
    op = "adam_step_"


class TestLion(OpContract):
    op = "lion_step_"
    compiled = False


class TestAdagrad(OpContract):
    op = "adagrad_step_"
    compiled = False


class TestSGD(OpContract):
    op = "sgd_step_"
    compiled = False


class TestLambUpdate(OpContract):
    op = "lamb_update_"
    compiled = False


class TestLambApply(OpContract):
    op = "lamb_apply_"
    compiled = False


class TestAdam8bit(OpContract):
    op = "adam8bit_step_"
    compiled = False


class TestUndo(OpContract):
    op = "step_undo_"
    compiled = False
