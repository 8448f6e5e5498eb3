"""Foreign masked checkpoints on transformers' own architectures."""
