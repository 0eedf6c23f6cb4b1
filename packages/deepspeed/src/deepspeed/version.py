"""The release of DeepSpeed whose interface this is, and after "+ds." our own version."""

__version__ = "0.19.8+ds.0.1.0"
