"""Errors in OpenAI's form."""

from __future__ import annotations

import math

from starlette.responses import JSONResponse

from streamjax.serving.requests import Overloaded

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told: a status, and `{"error": {message, type, param, code}}`.

    Args:
      status: of HTTP.
      message: one line that says what to do.
      param: the field of the request that is at fault.
      code: a short name of the error, for programs.
      headers: of the response, besides the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict:
        """The JSON that a client gets."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def overloaded(error: Overloaded) -> ApiError:
    """429, with the seconds after which to come again."""
    seconds = max(1, math.ceil(error.retry_after))
    return ApiError(429, str(error), code="overloaded", headers={"Retry-After": str(seconds)})
