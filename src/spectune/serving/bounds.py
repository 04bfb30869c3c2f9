"""What a request, and all of them together, may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Limits of a server.

    Attributes:
        max_rows: choices that are written at once; None: 16 on the CPU, 64 on a GPU.
        max_queue: choices that wait for one of these rows; more are refused (429).
        max_new_tokens: of a choice, and what a chat gets that names no limit.
        max_choices: of one request, over all its prompts.
        max_body_bytes: of a request; a longer one is refused (413) before it is read whole.
        request_seconds: from a request's arrival to the last byte of its answer (504).
        receive_seconds: for a request's headers, and again for its body (408).
        drain_seconds: how long running requests go on when the server is asked to stop.
        max_connections: open at once; more are closed again.
    """

    max_rows: int | None = None
    max_queue: int = 512
    max_new_tokens: int = 4096
    max_choices: int = 128
    max_body_bytes: int = 8 << 20
    request_seconds: float = 600.0
    receive_seconds: float = 30.0
    drain_seconds: float = 30.0
    max_connections: int = 1000
