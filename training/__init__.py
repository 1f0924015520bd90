"""Training, evaluation and pictures. Imports app; app never imports this."""
