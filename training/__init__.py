"""Training, evaluation and pictures. Imports app; app never imports this."""

import os

# Drawing does not use Matplotlib's configured backend, yet importing Matplotlib fails if the one that a notebook sets
# for its commands is not installed.
os.environ.pop("MPLBACKEND", None)
