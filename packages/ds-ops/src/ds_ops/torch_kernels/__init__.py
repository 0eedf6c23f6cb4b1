"""Ops that torch computes as well as we could: calls of its own kernels."""
