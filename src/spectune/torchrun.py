"""What torchrun tells each process that it starts, read from the environment. Commands ask before torch is there."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A process's place among all of a run; the only one where torchrun started none.

    Attributes:
        local_rank, local_size: the same on this machine.
        shared_store: where torchrun keeps what the processes have to know of each other, (host, port); None where
            another launcher started them.
        attempt: how often torchrun has started them again.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    shared_store: tuple[str, int] | None = None
    attempt: str = "0"

    @classmethod
    def from_environment(cls) -> "Place":
        told = os.environ
        store, size = None, int(told.get("WORLD_SIZE", "1"))
        if told.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and size > 1:
            store = told["MASTER_ADDR"], int(told["MASTER_PORT"])
        return cls(
            rank=int(told.get("RANK", "0")),
            size=size,
            local_rank=int(told.get("LOCAL_RANK", "0")),
            local_size=int(told.get("LOCAL_WORLD_SIZE", "1")),
            shared_store=store,
            attempt=told.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0
