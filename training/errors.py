"""How a training run can fail, besides the errors of the service."""

from app.errors import AppError


class TrainingError(AppError):
    """A run cannot go on; the message says why, and what can be done."""
