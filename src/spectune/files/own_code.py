"""The mark of a base whose own code the user trusts."""

from typing import Any


class OwnCode(dict[str, Any]):
    """A config's `auto_map`, which names the code that comes with a base, of a base that is loaded with
    `trust_remote_code`. No file can make one: what is read of `config.json` is a plain dict."""


def trusts(config: Any) -> bool:
    """Whether the user said, as this config was loaded, that the base's own code may run."""
    return isinstance(getattr(config, "auto_map", None), OwnCode)
