"""Versions: of the package, which delta folders and results carry, and of what it stands on. A leaf."""

from importlib import metadata

__version__ = "0.1.0"


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
