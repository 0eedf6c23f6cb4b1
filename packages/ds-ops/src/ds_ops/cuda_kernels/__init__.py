"""Kernels in CUDA C++, for what Triton does not do well: one so far, which keeps the way open.

A kernel is a `.cu` file without torch's headers, a header that declares how it is launched, and a
`.cpp` file that is the operator (torch's stable ABI). They become one library, built by nvcc where
an op is first computed by it, which also loads where there is no GPU and no CUDA.
"""
