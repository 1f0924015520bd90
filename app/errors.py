"""Everything a user of the service can get wrong, and everything the service may have to refuse.

    body --read--> bytes --admit--> queue --decode--> pixels --predict--> probabilities
         UnsupportedMedia  Overloaded       BadRequest       DeadlineExceeded
         BodyTooLarge      NotReady         BodyTooLarge
         TooSlow                            WrongSize

    AppError
    |-- StartError             the process exits non-zero with the sentence
    |   |-- SettingsError
    |   `-- CheckpointError
    |-- DataError              a data set cannot be used; training stops, the service goes on without it
    `-- RequestError           the answer carries the sentence, and the HTTP status of the class
        |-- BadRequest         400
        |-- Unauthorized       401
        |-- NotFound           404
        |-- MethodNotAllowed   405
        |-- TooSlow            408
        |-- WeightsRefused     409
        |-- BodyTooLarge       413
        |-- UnsupportedMedia   415
        |-- WrongSize          422
        |-- InvalidParameter   422
        |-- Overloaded         429
        |-- HeadTooLarge       431
        |-- NotOffered         501
        |-- NotReady           503
        `-- DeadlineExceeded   504

Each message is a sentence for a stranger: what was given, what it must be, what to do. It holds no library text, no
address, and no path of the server except for people who start it or have its key.
"""

from typing import Any


class AppError(Exception):
    """An error whose message is a sentence meant for the user."""


class StartError(AppError):
    """The process cannot start."""


class SettingsError(StartError):
    """A setting has an invalid value."""


class CheckpointError(StartError):
    """A weights file cannot be used."""


class DataError(AppError):
    """A data set is missing, broken or does not fit the network."""


class RequestError(AppError):
    """A request is refused.

    `status` is the HTTP status, `reason` its name in the metrics, `detail` an optional machine-readable explanation,
    `headers` further headers that HTTP asks for.
    """

    status = 500
    reason = "defect"
    retry_after_seconds: int | None = None

    def __init__(
        self,
        sentence: str,
        *,
        detail: Any = None,
        retry_after_seconds: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds or self.retry_after_seconds
        self.headers = headers or {}


class BadRequest(RequestError):
    """The bytes are not what they should be: no image, a broken image, malformed multipart."""

    status = 400
    reason = "bad_request"


class Unauthorized(RequestError):
    """The key is missing or wrong."""

    status = 401
    reason = "unauthorized"


class NotFound(RequestError):
    """There is no such thing here."""

    status = 404
    reason = "not_found"


class MethodNotAllowed(RequestError):
    """The path exists, but not for this method."""

    status = 405
    reason = "method_not_allowed"


class TooSlow(RequestError):
    """The head or the body did not arrive in time."""

    status = 408
    reason = "too_slow"


class WeightsRefused(RequestError):
    """The weights file cannot replace the weights being served."""

    status = 409
    reason = "weights_refused"


class BodyTooLarge(RequestError):
    """There are more bytes or pixels than the service accepts."""

    status = 413
    reason = "body_too_large"


class UnsupportedMedia(RequestError):
    """The service does not read this content type."""

    status = 415
    reason = "unsupported_media"


class WrongSize(RequestError):
    """The picture is readable, but the network does not take its size."""

    status = 422
    reason = "wrong_size"


class InvalidParameter(RequestError):
    """A query parameter has an invalid value."""

    status = 422
    reason = "invalid_parameter"


class Overloaded(RequestError):
    """The queue is full; trying again later helps."""

    status = 429
    reason = "overloaded"


class HeadTooLarge(RequestError):
    """The headers have too many bytes."""

    status = 431
    reason = "head_too_large"


class NotOffered(RequestError):
    """The service lacks this part of a protocol."""

    status = 501
    reason = "not_offered"


class NotReady(RequestError):
    """The service is stopping, or the answer is not known yet."""

    status = 503
    reason = "not_ready"
    retry_after_seconds = 1


class DeadlineExceeded(RequestError):
    """The answer would have come too late."""

    status = 504
    reason = "deadline_exceeded"
