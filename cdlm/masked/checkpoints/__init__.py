"""Foreign masked checkpoints on transformers' own architectures."""

from cdlm.masked.checkpoints.model import ForeignModel, open_checkpoint, open_folder, opens

__all__ = ["ForeignModel", "open_checkpoint", "open_folder", "opens"]
