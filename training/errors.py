"""How a training run can fail, besides the service's own errors."""

from app.errors import AppError


class TrainingError(AppError):
    """A run cannot go on; the message says why and what to do."""
