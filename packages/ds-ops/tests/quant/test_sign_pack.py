"""sign_pack and sign_unpack: every implementation against the reference."""

from __future__ import annotations

from ds_core.testing.contracts import OpContract


class TestSignPack(OpContract):
    op = "sign_pack"
    compiled = False


class TestSignPackFeedback(OpContract):
    op = "sign_pack_feedback_"


class TestSignUnpack(OpContract):
    op = "sign_unpack"
    compiled = False
