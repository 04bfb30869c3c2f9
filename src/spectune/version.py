"""The version, which delta folders and results carry. A leaf: the package itself imports every room."""

__version__ = "0.1.0"
