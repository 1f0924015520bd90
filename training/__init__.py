"""Training, evaluation and pictures. Imports app; app never imports this."""

import os

# Pictures are drawn without any of Matplotlib's backends, and importing it fails if the one that a notebook has chosen
# for its commands is not installed.
os.environ.pop("MPLBACKEND", None)
