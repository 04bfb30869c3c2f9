"""What is wrong with a request, as OpenAI's servers say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STOPPING = "the server is stopping"
#: by status; what is not here is the client's fault
_KINDS = {
    401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error",
    503: "server_error", 504: "server_error",
}  # fmt: skip


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP's.
        message: what was given, what was expected, what to do.
        param: the key of the request that it is about.
        code: a word for programs.
        headers: more of the answer's.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)
