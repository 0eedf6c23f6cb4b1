"""Benchmarks, one module per family: `ds ops bench layers`, or `python -m ds_ops.bench.layers`.

Each has `rows(seconds)`, which measures every op beside its floor and a peer in the same
interleaved run, and yields a `timing.Row` for each; `timing.main` prints them.
"""
