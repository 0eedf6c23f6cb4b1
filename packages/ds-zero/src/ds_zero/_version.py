"""Version of ds-zero."""

__version__ = "0.1.0"
