"""Kernels of torch itself, as implementations of ds-core's ops."""
