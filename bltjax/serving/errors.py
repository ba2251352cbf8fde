"""Errors as OpenAI's clients read them."""


class RequestError(Exception):
    """Raised for a request that gets no answer; the message names the value and the remedy.

    status: of HTTP. param: the field at fault. code: for programs. retry_after: seconds.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.param, self.status, self.code, self.retry_after = param, status, code, retry_after

    def content(self) -> dict:
        """Returns the body of the answer."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return dict(error=dict(message=str(self), type=kind, param=self.param, code=self.code))


KINDS = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
