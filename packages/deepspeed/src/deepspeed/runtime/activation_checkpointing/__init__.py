"""Activation checkpointing by the original's functions."""
