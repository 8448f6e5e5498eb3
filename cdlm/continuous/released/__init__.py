"""Networks of published checkpoints, and their file formats."""
