"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import json

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that the client is told. `param` names the field of the request that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    @property
    def content(self) -> dict:
        """The object that the client gets."""
        type_ = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": type_, "param": self.param, "code": self.code}}


def dump(content: dict) -> bytes:
    """JSON in ASCII escapes: some clients split a stream's lines at U+2028."""
    return json.dumps(content, separators=(",", ":")).encode("ascii")


def stopping() -> ApiError:
    """What a request gets while the server stops."""
    return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
