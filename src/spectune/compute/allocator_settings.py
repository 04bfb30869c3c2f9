"""Settings of torch's allocator for CUDA, as the environment has them: torch reads them when it is imported, and this
file does not import it."""

import os

#: torch's names for them
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
#: segments that grow: little is held unused, whatever sizes batches have
EXPANDABLE = "expandable_segments:True"


def are_given() -> bool:
    """Whether the user has settings of his own."""
    return any(os.environ.get(name) for name in NAMES)


def ask_for_expandable_segments() -> bool:
    """Whether the settings that are there do."""
    given = "".join(os.environ.get(name, "") for name in NAMES)
    return EXPANDABLE.lower() in given.lower().replace(" ", "")


def use_expandable_segments() -> None:
    """Set them for this process, before torch is imported, unless there are settings."""
    if not are_given():
        os.environ[NAMES[0]] = EXPANDABLE
