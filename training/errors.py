"""What a training run can end with, besides the errors of the service."""

from app.errors import AppError


class TrainingError(AppError):
    """A run that cannot go on, with a sentence that says why and what is left."""
