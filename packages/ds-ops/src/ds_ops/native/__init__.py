"""The C++ library: from its sources to a loaded file that torch calls.

`sources` says what is compiled and how, `toolchain` with what, `cache` where the result is kept,
`build` makes it, `library` finds or builds it, loads it and binds its kernels.
"""
