"""Version of ds-ops."""

__version__ = "0.1.0"
