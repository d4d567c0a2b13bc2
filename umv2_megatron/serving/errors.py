"""Errors that a client gets, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is not answered.

    Args:
        message: one sentence for the caller: the field, its value, what was expected.
        param: the field at fault.
        code: OpenAI's name of the fault, where it has one.
        status: of HTTP.
        kind: OpenAI's type of the fault.
        headers: that the answer brings.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code
        self.status, self.kind, self.headers = status, kind, headers

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def overloaded(limit: int) -> ApiError:
    """All ``limit`` places are taken; clients of OpenAI try again by themselves."""
    return ApiError(
        f"the server works on {limit} requests already (--max-concurrent); try again later",
        code="rate_limit_exceeded",
        status=429,
        kind="rate_limit_error",
        headers={"Retry-After": "1"},
    )


def stopping() -> ApiError:
    """The server was told to end."""
    return ApiError("the server is shutting down", code="server_shutting_down", status=503, kind="server_error")


def failed() -> ApiError:
    """A fault that is not the caller's; the log has the reason."""
    return ApiError(
        "the server could not generate an answer; its log says why",
        code="internal_error",
        status=500,
        kind="server_error",
    )
